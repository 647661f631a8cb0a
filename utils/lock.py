"""One writer for each run folder: a second start waits for the first, then says whose it is."""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from datetime import datetime
from typing import Any

from utils.errors import UserError

LOCK = ".lock"
POLL = 0.5  # seconds between tries
BEAT = 5.0  # seconds between the signs of life of an owner on a file system without locks
STARTED = datetime.now().astimezone().isoformat(" ", "seconds")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_owned: dict[str, int] = {}  # path and open file of each lock of this process
os.register_at_fork(after_in_child=_owned.clear)  # a child has no lock of its parent


def lock_folder(folder: str, patience: float) -> None:
    """Make this process the one that writes ``folder``, until it ends.

    The kernel drops the lock with the process, however that ends. Its data workers do not hold it:
    a lock of POSIX is not inherited. Where a file system has no locks, the owner writes a new sign
    of life into the file every few seconds, and whoever sees it change knows that the owner lives.

    Args:
        folder: an existing folder.
        patience: seconds to wait for another owner to end.

    Raises:
        UserError: another process still writes the folder.
        OSError: the lock file cannot be written.
    """
    path = os.path.join(os.path.realpath(folder), LOCK)
    own = _owned.get(path)
    if own is not None and os.path.exists(path) and os.stat(path).st_ino == os.fstat(own).st_ino:
        return  # of an earlier run of this process
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    tries = 1 + int(patience / POLL)
    for number in range(tries):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(file)
                return _lock_by_signs_of_life(folder, path, patience)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        else:
            os.truncate(file, 0)
            os.pwrite(file, _sign().encode(), 0)
            _owned[path] = file
            return
        if number == 0 and patience:
            _say(f"{_whose(folder, path)}: waiting at most {patience:g} s")
        if number + 1 < tries:
            time.sleep(POLL)
    raise UserError(_refusal(folder, path))


def _lock_by_signs_of_life(folder: str, path: str, patience: float) -> None:
    own, seen, unchanged = uuid.uuid4().hex, _read(path), 0
    for number in range(4 + int(patience / BEAT)):
        if not seen or unchanged == 3:  # nobody, or one who missed three signs
            _write(path, own)
            time.sleep(BEAT)  # two beats, so that an owner who lives after all would be seen
        time.sleep(BEAT)
        now = _read(path)
        if now.get("owner") == own:  # nor has another start written it since
            threading.Thread(target=_live, args=(path, own), daemon=True).start()
            return
        unchanged = unchanged + 1 if now == seen else 0
        if not unchanged and (number + 1) * BEAT > patience:
            break
        seen = now
    raise UserError(_refusal(folder, path))


def _live(path: str, own: str) -> None:
    while True:
        time.sleep(BEAT)
        try:
            _write(path, own)
        except OSError:  # the folder is away for a while
            continue


def _write(path: str, own: str) -> None:
    # opened and closed each time, so that a network file system passes it on; never empty
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(file, _sign(owner=own, sign=uuid.uuid4().hex).ljust(1000).encode(), 0)
    finally:
        os.close(file)


def _sign(**more: str) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": STARTED} | more)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _whose(folder: str, path: str) -> str:
    owner = _read(path)
    return (
        f"{folder}: process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')} has "
        f"written it since {owner.get('since', 'unknown')}"
    )


def _refusal(folder: str, path: str) -> str:
    return f"{_whose(folder, path)}: end that run, or choose another --tag"


def _say(message: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
