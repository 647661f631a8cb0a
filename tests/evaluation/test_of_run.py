"""An evaluation knows its run: which one it is, its network, and how it takes images."""

import pytest
import torch
from helpers import ROOT, TINY, figures

import eval_knn
import eval_linear
from evaluation.of_run import parse_evaluation
from models import build_method
from utils.config import load_config, to_json
from utils.errors import UserError

OPTS = [*TINY, "TEST.CROP", "False", "DATA.INTERPOLATION", "nearest", "DATA.IMG_SIZE", "40"]
OPTS += ["AMP_OPT_LEVEL", "bfloat16", "DATA.BATCH_SIZE", "2"]


def write_run(output, name="run", tag="a", opts=()):
    """A run folder as pre-training leaves it, of the recipe of another encoder."""
    opts = [*OPTS, "MODEL.NAME", name, "TAG", tag, "OUTPUT", str(output), *opts]
    config = load_config(str(ROOT / "configs/synco_swin_tiny.yaml"), opts)
    folder = output / name / tag
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    model = build_method(config).state_dict()
    torch.save({"model": model, "config": config.dump()}, folder / "checkpoint.pth")
    return folder


def parse(monkeypatch, *words, script=eval_knn):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    return parse_evaluation("", script.add_arguments)


def test_neither_recipe_nor_options_are_needed(run_main, imagenet, tmp_path):
    """The figures are those of a command that says all."""
    write_run(tmp_path)
    full = ["--cfg", "synco_swin_tiny", "--tag", "a", "--opts", *OPTS, "MODEL.NAME", "run"]
    full += ["AMP_OPT_LEVEL", "auto"]
    found = []
    short = ["--nb-knn", "5", "--opts", "DATA.NUM_WORKERS", "0"]
    for more in (full, ["--tag", "a", *short], short, ["--cfg", "byol_swin_tiny", *full[2:]]):
        words = ["--nb-knn", "5", "--data-path", imagenet, "--output", tmp_path, *more]
        run_main(eval_knn, *words)
        found.append(figures(tmp_path / "run/a/knn_imagenet/results.json"))
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["protocol"]["image_size"] == 40


@pytest.mark.parametrize("script", [eval_knn, eval_linear])
def test_the_run_gives_network_and_images_and_no_more(monkeypatch, tmp_path, script):
    folder = write_run(tmp_path)
    for words in (["--output", tmp_path], ["--pretrained", folder / "checkpoint.pth"]):
        _, config, notes = parse(monkeypatch, *words, script=script)
        assert (config.MODEL.ENCODER, config.DATA.IMG_SIZE) == ("vit_nano", 40)
        assert (config.TEST.CROP, config.DATA.INTERPOLATION) == (False, "nearest")
        # of how it is measured, and where, it says nothing
        assert (config.AMP_OPT_LEVEL, config.DATA.BATCH_SIZE) == ("auto", 64)
        assert config.MODEL.NAME == "run" and notes == []
    assert config.OUTPUT == "output" and config.TAG == "default"


def test_what_contradicts_the_run_is_a_line(monkeypatch, tmp_path):
    write_run(tmp_path)
    opts = ["--output", tmp_path, "--opts", "DATA.IMG_SIZE", "64", "TEST.CROP", "False"]
    _, config, notes = parse(monkeypatch, *opts)
    assert config.DATA.IMG_SIZE == 64 and notes == ["DATA.IMG_SIZE is 64, the run has 40"]
    with pytest.raises(UserError, match=r"the run has MODEL\.ENCODER vit_nano, not swin_tiny: le"):
        parse(monkeypatch, *opts[:2], "--opts", "MODEL.ENCODER", "swin_tiny")
    # the network of a recipe is that of pre-training anew
    assert parse(monkeypatch, "--cfg", "moby_swin_tiny", *opts[:2], "--tag", "a", "--opts",
                 "MODEL.NAME", "run")[1].MODEL.ENCODER == "vit_nano"  # fmt: skip


def test_one_run_is_taken_and_several_are_listed(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no run with config\.json .*: give --cfg"):
        parse(monkeypatch, "--output", tmp_path)
    write_run(tmp_path)
    assert parse(monkeypatch, "--output", tmp_path)[1].TAG == "a"
    write_run(tmp_path, tag="b")
    write_run(tmp_path, name="other", tag="a")
    with pytest.raises(UserError, match=r"several runs, choose .*: other/a, run/a, run/b$"):
        parse(monkeypatch, "--output", tmp_path)
    named = ["--output", tmp_path, "--opts", "MODEL.NAME", "run"]
    with pytest.raises(UserError, match=r"several runs, choose .*: run/a, run/b$"):
        parse(monkeypatch, *named)
    assert parse(monkeypatch, "--tag", "b", *named)[1].TAG == "b"
    # without its weights no run is meant
    config = parse(monkeypatch, "--cfg", "demo", "--random-weights", *named)[1]
    assert (config.TAG, config.MODEL.ENCODER) == ("default", "timm/test_resnet")
    # of several, the one of the default name
    write_run(tmp_path, tag="default")
    assert parse(monkeypatch, *named)[1].TAG == "default"


def test_a_damaged_configuration_is_one_line(monkeypatch, tmp_path):
    (write_run(tmp_path) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not the configuration of a run"):
        parse(monkeypatch, "--output", tmp_path)
