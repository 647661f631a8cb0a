"""Objects of other programs in a checkpoint, without their classes and without their code."""

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from utils.errors import UserError
from utils.unpickle import plain_global

# Python 2's names, which torch reads as these
MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Names that have no business in a checkpoint. None of them would run: this is to name such a file.
CODE = {"os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "importlib", "pty", "socket"}
CODE |= {"ctypes", "code", "pickle", "marshal", "webbrowser", "commands", "timeit", "pdb"}
CODE |= {f"builtins.{n}" for n in ("eval", "exec", "compile", "open", "print", "__import__")}
CODE |= {"io.open", "_io.open"}
LEGACY_PICKLES = 5  # of the format before torch 1.6: number, version, machine, content, keys


class _Fillable(type):
    """torch fills plain dictionaries only, which it tells by ``==`` of their classes."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class StandIn(list, metaclass=_Fillable):
    """In the place of an object whose class is not plain data; it can do nothing.

    Attributes:
        kind: the full name of the class, which is never imported.
        entries: attributes of the object, and its items if it was a dictionary.
    """

    kind = ""
    entries: dict[Any, Any]

    def __new__(cls, *_: Any) -> "StandIn":
        """An empty one, whatever the arguments."""
        made = super().__new__(cls)
        made.entries = {}
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def __setstate__(self, state: Any) -> None:
        # those of slots come as a second dictionary
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.entries.update(part)


def stand_ins(path: str) -> list[Callable | tuple[Callable, str]]:
    """What each name in the pickle of a checkpoint is read as, for ``torch.serialization``.

    Raises:
        UserError: a name of something that runs programs.
        pickle.UnpicklingError: of a kind of pickle that torch does not write.
    """
    found: list[Callable | tuple[Callable, str]] = []
    for module, name in _globals(path):
        module = MODULES.get(module, module)
        full = f"{module}.{name}"
        if module.split(".")[0] in CODE or full in CODE:
            raise UserError(f"{path}: a pickle with code (it calls {full}), not a checkpoint")
        plain = plain_global(module, name)
        kind = _Fillable("StandIn", (StandIn,), {"kind": full}) if plain is None else plain
        found.append((kind, full))
    return found


def entries_of(value: Any) -> dict[Any, Any]:
    """The entries of a dictionary, or of what stands for one or for an object; else none."""
    if isinstance(value, StandIn):
        return value.entries
    return value if isinstance(value, dict) else {}


def _globals(path: str) -> set[tuple[str, str]]:
    """The modules and names in the pickles of a file of either format of torch."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
            with archive.open(inside[0]) as file:
                return set(_names(file))
    found: set[tuple[str, str]] = set()
    with open(path, "rb") as file:
        for _ in range(LEGACY_PICKLES):
            found |= set(_names(file))
    return found


def _names(file: Any) -> Iterator[tuple[str, str]]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            raise pickle.UnpicklingError("a pickle that torch did not write")
