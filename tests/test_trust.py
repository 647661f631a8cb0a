"""Nothing from outside is run, and nothing is fetched unless asked."""

import ast
import socket

import pytest
from helpers import ROOT, SOURCES

from models.encoder import create_encoder

# calls that can run what a file holds
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("os.system", "os.popen", "shutil.unpack_archive", "torch.hub.load"),
}
# an encoder within a pickle that a process of its owner is reading anyway
NESTED = ("synco_vit/own.py", "pickle.loads")
FETCHING = {"pretrained", "download"}  # arguments of timm and torchvision


def calls(path):
    """The calls of a file, each with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str):
    """The text of a keyword argument, None if it is not given."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_the_sources_are_found():
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"main_pretrain.py", "data/source.py", "utils/unpickle.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_a_file_holds(path):
    for name, call in calls(path):
        where = f"{path}:{call.lineno}"
        nested = (str(path.relative_to(ROOT)), name) == NESTED
        assert name not in FORBIDDEN or nested, where
        assert not name.endswith((".extractall", ".extract")), where
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", where
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), where
        if name.startswith("subprocess."):
            assert keyword(call, "shell") in (None, "False"), where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_fetched_unless_asked(path):
    for name, call in calls(path):
        for argument in FETCHING:
            # timm's scheme for a folder on a disk
            local = call.args and ast.unparse(call.args[0]).startswith("f'local-dir:")
            if keyword(call, argument) == "True" and not local:
                # what --download reaches
                assert path.name in ("transfer.py", "opening.py"), f"{path}:{call.lineno}: {name}"


@pytest.mark.parametrize("encoder", ["vit_tiny", "swin_tiny", "timm/resnet18"])
def test_an_encoder_is_built_without_a_network(monkeypatch, encoder):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert sum(p.numel() for p in create_encoder(encoder).parameters()) > 1e6
