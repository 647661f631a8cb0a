"""Processes that are forked from one which has imported everything already.

Each starts in a fraction of a second, and is a process of its own, which can be killed. What needs
a new interpreter or a launcher of torch is started by ``helpers.run_script``.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import TimeoutExpired
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
PRELOADED = ["pytest", "hypothesis", "helpers", "torch._dynamo"]
PRELOADED += [path.stem for path in sorted(ROOT.glob("eval_*.py"))]


@cache
def forking() -> ForkServerContext:
    """The context whose processes are forked from one that has imported ``PRELOADED``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    places = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    server = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}
    with patch.dict(os.environ, server):
        forkserver.ensure_running()
    return context


class Script:
    """A script of the project in a process of its own; answers like ``subprocess.Popen``.

    Args:
        script: its path below the root.
        arguments: its command line.
        ignored: signals that it ignores from its start.
        environment: variables besides those of this process.
    """

    def __init__(self, script: str, *arguments, ignored=(), environment=None) -> None:
        self.output = tempfile.NamedTemporaryFile("r")  # noqa: SIM115, closed with the object
        words = [str(ROOT / script), *map(str, arguments)]
        variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        variables |= {k: str(v) for k, v in (environment or {}).items()}
        given = (words, ignored, variables, self.output.name)
        self.process = forking().Process(target=_run, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 200) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.process.name, timeout, self.text())
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, None]:
        """What it wrote to standard output and standard error, once it has ended."""
        self.wait(timeout)
        return self.text(), None

    def text(self) -> str:
        return Path(self.output.name).read_text()


def _run(words: list[str], ignored, variables: dict[str, str], output: str) -> None:
    import torch

    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # as a terminal leaves it, also where the tests themselves were started by nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    as_in_a_script()
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    runpy.run_path(words[0], run_name="__main__")


def as_in_a_script() -> None:
    """Data workers are forked, as by default on Linux."""
    multiprocessing.set_start_method("fork", force=True)


def run_group(places: list[dict], script: str, *arguments) -> list[Script]:
    """A script in a process at each place; as with a launcher, the first that fails ends all."""
    group = [Script(script, *arguments, environment=place) for place in places]
    end = time.monotonic() + 300
    while running := [one.process.sentinel for one in group if one.poll() is None]:
        if any(one.poll() for one in group) or time.monotonic() > end:
            for one in group:
                one.kill()
        connection.wait(running, 1)
    return group
