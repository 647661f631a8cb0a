"""Reading pickles of plain data from outside without running what they hold."""

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, cast

import numpy as np

from utils.errors import reading

# numbers, booleans, byte strings and text: no objects and no records, whose state numpy trusts
_PLAIN_DTYPE = re.compile(r"[<>|=]?(\?|[biufc]\d{1,2}|[SU]\d{1,9})")


def load_plain_pickle(path: str, encoding: str = "ASCII") -> Any:
    """Read a pickle of containers, numbers, text and numpy arrays of these.

    A pickle can name any function for the reader to call. Here only those that build plain data
    are known, and numpy's are replaced by ones that check their arguments.

    Args:
        path: the file, of any pickle protocol, from Python 2 or 3 and numpy 1 or 2.
        encoding: of the strings of Python 2: ``ASCII``, ``latin1`` or ``bytes``.

    Returns:
        what was pickled; an array may come as a subclass of ``np.ndarray``.

    Raises:
        UserError: a file that cannot be read, is damaged, or names anything else.
    """
    with reading(path, "not a pickle of plain data"):
        content = Path(path).read_bytes()
        _check_sizes(content)
        return _PlainUnpickler(io.BytesIO(content), encoding=encoding).load()


def _check_sizes(content: bytes) -> None:
    """Refuse what would need much more memory than the file has bytes."""
    for opcode, argument, _ in pickletools.genops(content):  # refuses lengths beyond the end
        # the memo is an array as long as its highest number
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")


def plain_global(module: str, name: str) -> Any:
    """What builds the plain data that a pickle names so, None for anything else."""
    module = module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
    return _KNOWN.get((module, name))


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = plain_global(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


class _Dtype:
    def __init__(self, name: str | bytes, align: bool = False, copy: bool = False) -> None:
        text = name.decode() if isinstance(name, bytes) else name
        if not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"it names the data type {text}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        # only the byte order: numpy believes forged sizes and flags, and corrupts its memory
        order: Any = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    def __new__(cls, *_: Any) -> "_Array":
        raise pickle.UnpicklingError("it makes an array without content")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        array = _from_buffer(content, dtype, shape, "F" if fortran else "C")
        reduced: Any = array.__reduce__()  # a tuple, for an array
        super().__setstate__(reduced[2])


def _reconstruct(kind: type, shape: tuple, typecode: str | bytes) -> np.ndarray:
    return np.empty(0, np.int8).view(_Array)


def _from_buffer(
    content: str | bytes, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None
) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content
    count = int(np.prod(shape, dtype=object))
    if min(shape, default=0) < 0 or len(content) != count * dtype.dtype.itemsize:
        raise pickle.UnpicklingError("an array's size does not match its content")
    # empty arrays included, which frombuffer refuses
    array = np.ndarray(shape, dtype.dtype, content, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(axes)


def _scalar(dtype: _Dtype, content: str | bytes) -> np.generic:
    return cast(np.generic, _from_buffer(content, dtype, (), "C")[()])


def _encode(text: str, encoding: str) -> bytes:
    # how protocols below 3 write bytes; other codecs can unpack a bomb
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it names the codec {encoding}")
    return text.encode("latin1")


def _plain_dict(*_: Any) -> dict:
    return {}  # without what makes the default


_KNOWN = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("collections", "defaultdict"): _plain_dict,
    ("builtins", "bytes"): bytes,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,  # the argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}
