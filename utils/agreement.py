"""Checking that all processes run the same program on the same data, before it would hang."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from yacs.config import CfgNode

from utils.config import as_dict, leaves
from utils.distributed import all_gather_objects
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "data", "evaluation", "utils")
# may differ from one machine to the next
LOCAL_KEYS = ("LOCAL_RANK", "DATA.DATA_PATH", "DATA.NUM_WORKERS")


def check_agreement(
    facts: dict[str, object],
    advice: str = "start all processes with the same arguments, code and data",
) -> None:
    """Compare what each process holds of ``facts``; every process has to call it.

    Args:
        facts: short values, by names that a user knows.
        advice: what to do if they differ.

    Raises:
        UserError: on every process: which one differs from the first, and in what.
    """
    first, *others = all_gather_objects(facts)
    for number, theirs in enumerate(others, 1):
        for name in first.keys() | theirs.keys():
            one, other = first.get(name), theirs.get(name)
            if one != other:
                raise UserError(
                    f"process {number} differs from process 0: {name} is {other}, not {one}: "
                    f"{advice}"
                )


def configuration_facts(config: CfgNode) -> dict[str, object]:
    """Each key of the configuration with its value, except those that may differ."""
    return {k: repr(v) for k, v in leaves(as_dict(config)) if k not in LOCAL_KEYS}


def code_facts() -> dict[str, object]:
    """One digest of all source files of the program."""
    return {"the program's source (sha256)": source_digest()}


def source_digest() -> str:
    """The ``digest`` of all source files of the program, with their names."""
    files = [*ROOT.glob("*.py"), *(p for d in ROOMS for p in (ROOT / d).glob("*.py"))]
    named = ((str(path.relative_to(ROOT)), path.read_bytes()) for path in sorted(files))
    return digest(part for pair in named for part in pair)


def digest(parts: Iterable[str | bytes]) -> str:
    """The first 16 digits of the SHA-256 of all parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()[:16]
