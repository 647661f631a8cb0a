"""The example of docs/extending.md trains as the page says."""

import re

import pytest
import torch
from helpers import ROOT, TINY

import main_pretrain
import models
from models import build_method
from utils.config import load_config
from utils.errors import UserError

PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def registered(monkeypatch):
    """The class of the page's code block, under the name of its line in METHODS."""
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (name, label) = re.search(r'`"(\w+)": (\w+)`', PAGE).groups()
    scope = {"__name__": f"models.{name}"}
    exec(compile(code, "docs/extending.md", "exec"), scope)
    monkeypatch.setitem(models.METHODS, name, scope[label])
    assert len(code.splitlines()) < 40
    return name


def test_the_example_trains(registered, run_main, imagenet, tmp_path):
    opts = re.search(r"--opts (MODEL\.TYPE .*)", PAGE)[1].split()
    assert opts[1] == registered
    common = ("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", imagenet)
    run_main(main_pretrain, *common, "--output", tmp_path, "--opts", *TINY, *opts)
    state = torch.load(tmp_path / opts[3] / "default" / "checkpoint.pth", weights_only=True)
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), [*TINY, *opts])
    method = build_method(config)
    assert method.scale == 0.1
    before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    method.load_state_dict(state["model"])
    assert any(not v.equal(before[k]) for k, v in method.encoder.state_dict().items())
    assert "queue1" not in state["model"]


@pytest.mark.parametrize(
    "option, message",
    [
        (("scal", "1"), r"MODEL\.OPTIONS\.scal: the options of mocov3 are: scale"),
        (("scale", "large"), "MODEL.TYPE mocov3: could not convert"),
    ],
)
def test_options_that_a_method_refuses(registered, option, message):
    key, value = option
    opts = [*TINY, "MODEL.TYPE", registered, f"MODEL.OPTIONS.{key}", value]
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    with pytest.raises(UserError, match=message):
        build_method(config)


def test_a_method_without_own_options_says_so():
    opts = [*TINY, "MODEL.OPTIONS.scale", "1"]
    with pytest.raises(UserError, match="the options of moby are: none"):
        build_method(load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts))
