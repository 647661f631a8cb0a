"""Where a result, a checkpoint or an exported file came from: its entry ``provenance``."""

import datetime
import hashlib
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import ArrayLike
from torch import nn
from yacs.config import CfgNode

from utils.config import to_json
from utils.distributed import world_size

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "data", "evaluation", "utils")
# what is known of the weights: the file, the digest of the encoder's weights, whose they are
ORIGIN = ("checkpoint", "weights", "method", "encoder", "network", "key", "epoch", "step")
# no lock is taken, and no program that the repository's configuration names is started
GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false")
GIT_SECONDS = 5.0


def gather_provenance(
    config: CfgNode, device: torch.device, origin: Mapping[str, Any], data: Any
) -> dict[str, Any]:
    """What stays the same all through a run; ``cost`` adds the rest.

    It starts git, and reads the source, so it is for the start of a run.

    Args:
        config: the configuration in effect, as config.json has it.
        device: of the run.
        origin: of the weights, with keys of ``ORIGIN``; those that are missing are None.
        data: from ``describe_images``.

    Returns:
        numbers, text, None and dictionaries of these.
    """
    return {
        "version": _version(),
        **_commit(),
        "source": source_digest(),
        "command": shlex.join(sys.argv),
        "config": hashlib.sha256(to_json(config).encode()).hexdigest(),
        **{name: origin.get(name) for name in ORIGIN},
        "data": data,
        "seed": config.SEED,
        "precision": config.AMP_OPT_LEVEL,
        "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
    }


def cost(device: torch.device, started: float) -> dict[str, Any]:
    """The date, the peak memory in MB, and the seconds since ``started`` of ``time.monotonic``."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_mb": round(memory(device), 1),
    }


def memory(device: torch.device) -> float:
    """The most memory used so far in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def describe_images(root: str, **splits: tuple[Sequence[str], ArrayLike]) -> dict[str, Any]:
    """What tells one list of images from another; the pixels do not count, nor where it lies.

    Args:
        root: the data path, which is taken off the names.
        splits: for each split the names of its images, and whole numbers that label them.

    Returns:
        ``digest`` of names and labels, and the number of ``images`` by split.
    """
    total = hashlib.sha256()
    for split, (names, labels) in splits.items():
        numbers = np.asarray(labels, dtype=np.int64)
        facts = (split, names_digest(names, root), repr(numbers.shape))
        total.update("\0".join(facts).encode())
        total.update(np.ascontiguousarray(numbers).data)
    images = {split: len(names) for split, (names, _) in splits.items()}
    return {"digest": total.hexdigest(), "images": images}


def source_digest() -> str:
    """The first 16 digits of a SHA-256 of all source files of the program, with their names."""
    total = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *(p for d in ROOMS for p in (ROOT / d).glob("*.py"))]):
        for part in (str(path.relative_to(ROOT)).encode(), path.read_bytes()):
            total.update(part + b"\0")
    return total.hexdigest()[:16]


def names_digest(names: Sequence[str], root: str) -> str:
    """The SHA-256 of all names, with a NUL after each; ``root`` is taken off where it begins one.

    A list that ``data.listing`` keeps has it at hand, as ``names.digest``.
    """
    if known := getattr(names, "digest", None):
        return known
    # torchvision's readers tidy the path up
    start = root if not names or names[0].startswith(root) else os.path.normpath(root)
    total = hashlib.sha256()
    for name in names:
        short = name.removeprefix(start).lstrip(os.sep)
        total.update(short.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A checksum of all weights, which tells one encoder from another."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(_bytes(value))
    return total.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a dense tensor: its type, shape and values."""
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _version() -> str | None:
    path = ROOT / "pyproject.toml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else None


def _commit() -> dict[str, Any]:
    """The commit of the code and whether tracked files differ from it, None where git fails."""
    # the code may lie in somebody else's repository, which does not track it
    tracked = _git("ls-files", "--error-unmatch", "main_pretrain.py") is not None
    commit = _git("rev-parse", "HEAD") if tracked else None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".") if commit else None
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    # a hook of git sets variables that name another repository
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*GIT, *arguments],
            cwd=ROOT,
            env=environment | {"GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
