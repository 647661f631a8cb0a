"""A tiny ImageNet, a process group, and scripts run in this process."""

import logging
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import write_images
from hypothesis import settings

# a busy machine is no failure
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items) -> None:
    """Each worker of xdist, which gets an equal part of the list, begins with its slow tests.

    A long test that began last would leave the other cores waiting.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = [item for item in items if "slow" in item.keywords]
    quick = iter([item for item in items if "slow" not in item.keywords])
    ordered: list[pytest.Item] = []
    for worker in range(1, workers + 1):
        ordered += slow[(worker - 1) * len(slow) // workers : worker * len(slow) // workers]
        ordered += islice(quick, max(0, worker * len(items) // workers - len(ordered)))
    items[:] = [*ordered, *quick]


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A data set of 24 training and 7 validation images in 2 classes."""
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "train")
    write_images(root / "val", images=4)
    (root / "val" / "class1" / "3.jpg").unlink()
    return root


@pytest.fixture
def process_group():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """The lines of the log, whatever a run before has done to the logger."""
    messages = Messages()
    logging.getLogger("synco").setLevel(logging.INFO)
    monkeypatch.setattr(logging.getLogger("synco"), "handlers", [messages])
    return messages.lines


def main_runner(monkeypatch: pytest.MonkeyPatch):
    """What ``run_main`` gives."""

    def run(module, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        try:
            module.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


@pytest.fixture
def run_main(monkeypatch):
    """Run a script's ``main`` in this process: ``run_main(module, *arguments)``."""
    return main_runner(monkeypatch)


@pytest.fixture(scope="module")
def run_main_once():
    """The same for what the tests of a file share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield main_runner(monkeypatch)
