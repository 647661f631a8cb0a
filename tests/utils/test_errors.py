import json
import os

import pytest

from utils.errors import Diverged, UserError, reading


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "in/side"), "in/side: no such file"),
        (PermissionError(13, "Permission denied"), "a.txt: cannot read (Permission denied)"),
        (OSError("truncated"), "a.txt: cannot read (truncated)"),
        (RecursionError(), "a.txt: cannot read (RecursionError)"),
        (KeyError("two\nlines"), "a.txt: cannot read ('two\\nlines')"),
        (MemoryError("x" * 999), f"a.txt: cannot read ({'x' * 200})"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_a_file_raises_becomes_one_line(raised, said):
    with pytest.raises(UserError) as caught, reading("a.txt"):
        raise raised
    assert str(caught.value).startswith(said) and caught.value.__cause__ is raised


def test_what_is_said_already_stays():
    with pytest.raises(Diverged, match=r"^lower the rate$"), reading("a.txt"):
        raise Diverged("lower the rate")


def test_real_files(tmp_path):
    damaged = tmp_path / "a.json"
    damaged.write_text("{")
    with (
        pytest.raises(UserError, match=r"a\.json: not JSON \(Expecting"),
        reading(damaged, "not JSON"),
    ):
        json.loads(damaged.read_text())
    with (
        pytest.raises(UserError, match=r"cannot write \(Is a directory"),
        reading(tmp_path, "cannot write"),
    ):
        tmp_path.write_text("")
    with reading(damaged):
        assert os.path.exists(damaged)


def test_ending_is_no_mistake():
    with pytest.raises(SystemExit), reading("a.txt"):
        raise SystemExit(75)
