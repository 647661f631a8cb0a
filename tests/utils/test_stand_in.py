"""Whole training checkpoints are read, and nothing in a file runs."""

import argparse
import collections
import os
import pathlib
import pickle
import sys

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from utils.checkpoint import read_checkpoint
from utils.errors import UserError
from utils.stand_in import StandIn, entries_of


class Slots:
    __slots__ = ("arch",)

    def __init__(self):
        self.arch = "vit_small"


class Odd(dict):
    """As CfgNode and EasyDict are: items and attributes."""

    def __init__(self):
        super().__init__(arch="vit_small")
        self.frozen = True


class Calls:
    """Calls a function when it is read, with an argument that names a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def frozen():
    config = CfgNode({"MODEL": {"TYPE": "moby", "NUM_HEADS": 6}, "TAG": "x"})
    config.freeze()
    return config


def optimizer():
    parameter = torch.nn.Parameter(torch.ones(2))
    found = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    found.step()
    return found.state_dict()


def read(tmp_path, state, legacy=False):
    path = tmp_path / "c.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return read_checkpoint(str(path))


PLAIN = {
    "set": {1, 2},
    "frozenset": frozenset([3]),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": {"a": [1]},
    "Counter": collections.Counter("aab"),
    "float64": np.float64(2.5),
    "int64": np.int64(3),
    "bool_": np.bool_(True),
    "complex": 1j,
    "bytes": b"\x00\xff",
    "text": "a",
    "none": None,
}
SAVED = PLAIN | {"defaultdict": collections.defaultdict(list, a=[1])}


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_data_is_read_as_it_is(tmp_path, legacy):
    state = {"model": {"w": torch.ones(2)}, "optimizer": optimizer(), "array": np.eye(2), **SAVED}
    # so that the stand-ins are needed
    found = read(tmp_path, state | {"config": frozen()}, legacy)
    for name, value in PLAIN.items():
        assert type(found[name]) is type(value) and found[name] == value, name
    np.testing.assert_array_equal(found["array"], np.eye(2))
    assert found["model"]["w"].equal(torch.ones(2))
    moments = found["optimizer"]["state"][0]
    assert moments["exp_avg"].equal(state["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value, kind, entries",
    [
        (frozen(), "yacs.config.CfgNode", {"TAG": "x"}),
        (argparse.Namespace(arch="vit_small"), "argparse.Namespace", {"arch": "vit_small"}),
        (pathlib.PurePosixPath("a/b"), "PurePosixPath", {}),
        (collections.deque([1], maxlen=2), "collections.deque", {}),
        (Slots(), "test_stand_in.Slots", {"arch": "vit_small"}),
        (Odd(), "test_stand_in.Odd", {"arch": "vit_small", "frozen": True}),
        (slice(1, 2), "builtins.slice", {}),
        (argparse.ArgumentParser, None, {}),  # a class itself
        (np.random.RandomState(0), "numpy.random", {}),
    ],
    ids=lambda value: type(value).__name__,  # a name that is the same in each test process
)
def test_other_objects_become_stand_ins(tmp_path, value, kind, entries, legacy):
    if isinstance(value, collections.deque) and torch.__version__ < "2.12":
        pytest.skip("torch before 2.12 refuses what is like a list, and is none")
    found = read(tmp_path, {"x": value, "w": torch.ones(1)}, legacy)
    assert found["w"].equal(torch.ones(1))
    if kind is None:
        assert issubclass(found["x"], StandIn)
        return
    assert isinstance(found["x"], StandIn) and kind in found["x"].kind
    assert entries_of(found["x"]).items() >= entries.items()


def test_a_class_is_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "elsewhere.py").write_text("class Settings:\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    module = __import__("elsewhere")
    settings = module.Settings()
    settings.rate = 0.1
    torch.save({"w": torch.ones(1), "settings": settings}, tmp_path / "c.pth")
    (folder / "elsewhere.py").write_text("raise SystemExit('imported')\n")
    del sys.modules["elsewhere"]
    found = read_checkpoint(str(tmp_path / "c.pth"))["settings"]
    assert entries_of(found) == {"rate": 0.1} and "elsewhere" not in sys.modules
    assert entries_of(3) == {} and entries_of({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function, arguments, name",
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (open, ("{}", "w"), "io.open"),
        (__import__, ("antigravity",), "builtins.__import__"),
        (pickle.loads, (b"",), "pickle.loads"),
        (pathlib.Path.touch, ("{}",), None),  # a stand-in, which does nothing
        (torch.hub.load, ("{}", "x"), None),
        (np.save, ("{}", 3), None),
    ],
)
def test_code_does_not_run(tmp_path, function, arguments, name, legacy):
    mark = tmp_path / "ran.npy"
    given = [a.format(mark) if isinstance(a, str) else a for a in arguments]
    try:
        found = read(tmp_path, {"w": torch.ones(1), "x": Calls(function, *given)}, legacy)
    except UserError as error:
        assert name is None or f"a pickle with code (it calls {name}), not a ch" in str(error)
        assert "\n" not in str(error) and "weights_only" not in str(error)
    else:
        assert name is None and isinstance(found["x"], StandIn)
    assert not mark.exists() and "antigravity" not in sys.modules


def test_safe_names_are_forgotten(tmp_path):
    """What one file needs is not allowed in what is read elsewhere afterwards."""
    before = set(torch.serialization.get_safe_globals())  # kept in any order
    read(tmp_path, {"config": frozen()})
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)


def test_a_model_as_an_object_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pth")
    with pytest.raises(
        UserError, match=r"nn\..*Linear, a whole model as an object: save its state"
    ):
        read_checkpoint(str(tmp_path / "c.pth"))


@pytest.mark.parametrize("forged", [("O8", b"12345678"), ("f8", b"short")])
def test_arrays_are_checked(tmp_path, forged):
    """numpy would believe these; see test_unpickle.py for more of them."""
    kind, content = forged
    scalar = np.float64(1).__reduce__()[0]
    dtype = Calls(np.dtype, kind, False, True)
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        read(tmp_path, {"x": Calls(scalar, dtype, content)})
    with pytest.raises(UserError, match="array without content"):
        read(tmp_path, {"x": Calls(np.ndarray, (2, 2))})
