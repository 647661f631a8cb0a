"""The project's own modules, for a program that may have others of the same names."""

import contextlib
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).resolve().parent
_PACKED = _HERE / "_code"  # of a wheel; in a checkout the code lies beside this package
CODE = _PACKED if _PACKED.is_dir() else _HERE.parent
ROOMS = ("data", "evaluation", "logger", "models", "utils")

_kept: dict[str, ModuleType] = {}  # imported before, while the caller's were set aside


@contextlib.contextmanager
def own_modules() -> Iterator[None]:
    """Let ``import models`` and the like find the project's, within the block.

    The caller's modules of these names are set aside meanwhile. The project's are kept for the
    next block, so that nothing is imported twice.
    """
    loaded = getattr(sys.modules.get("models"), "__file__", None)
    if loaded and Path(loaded).resolve() == CODE / "models" / "__init__.py":
        yield  # they are the caller's own
        return
    aside = _take()
    sys.modules.update(_kept)
    sys.path.insert(0, str(CODE))
    try:
        yield
    finally:
        sys.path.remove(str(CODE))
        _kept.update(_take())
        sys.modules.update(aside)


def keep_picklable(encoder: Any) -> Any:
    """Let an encoder of the project's classes pickle where their modules are set aside."""
    encoder.__reduce_ex__ = partial(_reduce, encoder)
    return encoder


def _reduce(encoder: Any, protocol: int) -> tuple[Callable, tuple[bytes]]:
    own = vars(encoder).pop("__reduce_ex__")  # within, it pickles as any other object
    try:
        with own_modules():
            return _restore, (pickle.dumps(encoder, protocol),)
    finally:
        encoder.__reduce_ex__ = own


def _restore(content: bytes) -> Any:
    with own_modules():
        return keep_picklable(pickle.loads(content))


def _take() -> dict[str, ModuleType]:
    """Remove the modules of these names from Python's table, and return them."""
    names = [name for name in sys.modules if name.split(".")[0] in ROOMS]
    return {name: sys.modules.pop(name) for name in names}
