"""The exceptions for what a user can mend, the place that makes them of others, and their end."""

import contextlib
import difflib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can mend: one line saying what was wrong, where, and what to do.

    Names and reasons from outside may hold line breaks and a terminal's control codes. Lines are
    joined, and codes are escaped.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class LostPeer(RuntimeError):
    """Another process of the group has died, or shows no sign of life."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``, did you mean a or b?`` of the nearest names, empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


class Diverged(UserError):
    """Training has diverged: what it has learned must not replace the last good checkpoint."""


@contextlib.contextmanager
def reading(path: object, doing: str = "cannot read") -> Iterator[None]:
    """Within it, whatever is raised becomes one line: the file, what was being done, and why.

    Keep the block to what opens, reads, parses or writes the file: a fault of the program itself
    belongs outside, where it keeps its traceback.

    Args:
        path: the user's file or folder.
        doing: what fails, such as ``cannot write the results``.

    Raises:
        UserError: in place of any other exception, but for a lost process.
    """
    try:
        yield
    except (UserError, LostPeer):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file or folder") from error
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where}: {doing} ({error.strerror or error})") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        raise UserError(f"{path}: {doing} ({_words(error)})") from error


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said[:200] or type(error).__name__


def end_with(code: int, line: str, trace: str = "") -> NoReturn:
    """End this process at once, with a line on standard error that says why.

    Of the processes that torchrun has started on a machine, only the first that ends says so:
    the others have the same mistake, or miss the first. What each would say is in torchrun's
    report, as that of torch's ``record`` is.
    """
    line, first = f"{os.path.basename(sys.argv[0])}: {line}", True
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # ATTEMPT/PROCESS/error.json
        said = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": int(time.time())}}
        try:
            Path(name).write_text(json.dumps({"message": said}), encoding="utf-8")
            Path(name).parent.with_name("said").touch(exist_ok=False)
        except FileExistsError:
            first = False
        except OSError:  # no reason for silence
            pass
    if first:
        print(trace + line, file=sys.stderr, flush=True)
    os._exit(code)
