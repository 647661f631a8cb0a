import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils.errors import Diverged, LostPeer, UserError, reading


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


def test_a_lost_process_is_no_fault_of_the_file():
    with pytest.raises(LostPeer), reading("a.txt"):
        raise LostPeer("process 1 has ended")


END = "import atexit, sys; atexit.register(print, 'detour'); from utils.errors import end_with; "


def end(folder: Path | None, line: str, trace: str = "") -> subprocess.CompletedProcess:
    """A process that ends, where torchrun expects its error in ``folder``."""
    variables = {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json")} if folder else {}
    code = END + f"end_with(7, {line!r}, {trace!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_end_says_why_and_takes_no_detour():
    for _ in range(2):  # without torchrun, each process says so
        done = end(None, "why", "Traceback\n")
        assert (done.returncode, done.stdout, done.stderr) == (7, "", "Traceback\n-c: why\n")


def test_of_a_machines_processes_the_first_says_why_and_torchruns_report_has_each(tmp_path):
    for number, line in enumerate(("a mistake", "a mistake", "another process died")):
        folder = tmp_path / "attempt_0" / str(number)
        folder.mkdir(parents=True)
        done = end(folder, line)
        assert (done.returncode, done.stderr) == (7, "" if number else f"-c: {line}\n")
        failure = ProcessFailure(number, 1, done.returncode, str(folder / "error.json"))
        assert f"-c: {line}" in ChildFailedError("x", {number: failure}).format_msg()
    again = tmp_path / "attempt_1" / "0"  # after a restart
    again.mkdir(parents=True)
    assert end(again, "a mistake").stderr == "-c: a mistake\n"


def test_an_error_file_that_cannot_be_written_silences_nobody(tmp_path):
    done = end(tmp_path / "gone", "a mistake")
    assert (done.returncode, done.stderr) == (7, "-c: a mistake\n")
