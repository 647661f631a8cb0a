"""One writer for each run folder: a second start waits for the first, then says whose it is."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from datetime import datetime

from utils.errors import UserError

LOCK = ".lock"
POLL = 0.5  # seconds between tries
STARTED = datetime.now().astimezone().isoformat(" ", "seconds")
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_folder(folder: str, patience: float) -> None:
    """Make this process the one that writes ``folder``, until it ends.

    The kernel drops the lock with the process, however that ends. Its data workers do not hold it:
    a lock of POSIX is not inherited. On a file system without locks, a line warns that nothing
    keeps two runs apart.

    Args:
        folder: an existing folder.
        patience: seconds to wait for another owner to end.

    Raises:
        UserError: another process still writes the folder.
        OSError: the lock file cannot be written.
    """
    # stays open: to close any file of the path would drop the lock
    file = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + patience
    waits = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                _say(f"{folder}: its file system has no locks: start no second run here")
                break
            if error.errno not in HELD:
                raise
        owner = _owner(folder, file)
        if time.monotonic() >= end:
            os.close(file)
            raise UserError(f"{owner}: end that run, or choose another --tag")
        if not waits:
            _say(f"{owner}: waiting at most {patience:g} s")
        waits = True
        time.sleep(POLL)
    said = {"host": socket.gethostname(), "pid": os.getpid(), "since": STARTED}
    os.truncate(file, 0)
    os.pwrite(file, json.dumps(said).encode(), 0)


def _owner(folder: str, file: int) -> str:
    try:
        said = json.loads(os.pread(file, 1000, 0))
        who = f"process {said['pid']} on {said['host']} has written it since {said['since']}"
    except (ValueError, TypeError, KeyError):  # it has not said so yet
        who = "another process writes it"
    return f"{folder}: {who}"


def _say(message: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
