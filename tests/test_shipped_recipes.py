"""The recipes for what people do without a cluster: each loads, and a dry run goes through."""

import re

import pytest
import torch
from helpers import ROOT, TINY

import main_pretrain
from models import build_method
from tools.make_tiny_transfer import write_tiny
from utils.config import check_ranges, load_config
from utils.recipes import recipe_names

# processes for which a recipe is, and images of its update
GROUPS = {
    "one_gpu_24gb": (1, 512),
    "four_gpus": (4, 512),
    "eight_gpus": (8, 512),
    "small_images": (1, 256),
    "own_photographs": (1, 64),
    "continued": (1, 256),
}


def test_these_are_all():
    published = re.compile(r"(moby|byol|synco)_(vit|swin)_(tiny|small|base|large|huge)")
    others = {name for name in recipe_names() if not published.fullmatch(name)}
    assert others == GROUPS.keys() | {"demo", "demo_photos"}


@pytest.mark.parametrize("name", GROUPS)
def test_a_recipe_builds_and_says_what_it_costs(name):
    config = load_config(name)
    check_ranges(config)
    processes, images = GROUPS[name]
    each = config.DATA.BATCH_SIZE * max(1, config.TRAIN.ACCUMULATION_STEPS)
    assert each * processes == images <= config.MODEL.CONTRAST_NUM_NEGATIVE
    model = build_method(config)
    epochs = model.epochs_with_synthetic(config.TRAIN.EPOCHS)
    # in the same third of the run as published: 30 to 100 of 300
    first, last = epochs[0] / config.TRAIN.EPOCHS, epochs[-1] / config.TRAIN.EPOCHS
    assert first == pytest.approx(0.1, abs=0.005) and last == pytest.approx(1 / 3, abs=0.01)
    text = (ROOT / f"configs/{name}.yaml").read_text()
    comment = " ".join(re.findall("# ?(.*)", text.split("BASE")[0]))
    assert re.search(r"Memory and time( on a GPU)?: (not measured|[\d.]+ GB)", comment)
    command = re.search(r"(main_pretrain\.py --cfg \w+ .*?--output OUT)", comment)[1]
    assert command.split()[2] == name and ("torchrun" in comment) == (processes > 1)


def weights(folder) -> str:
    state = build_method(load_config("continued", TINY)).state_dict()
    torch.save({"model": state}, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("name", GROUPS)
def test_a_dry_run(run_main, imagenet, tmp_path, capsys, name):
    """On miniature data and a tiny network."""
    given = ["--cfg", name, "--dry-run", "--output", tmp_path / "out"]
    data = {"own_photographs": imagenet / "train/class0", "small_images": tmp_path / "cifar"}
    given += ["--data-path", data.get(name, imagenet)]
    if name == "small_images":
        write_tiny("cifar10", str(tmp_path / "cifar"))
    if name == "continued":
        given += ["--pretrained", weights(tmp_path)]
    run_main(main_pretrain, *given, "--opts", *TINY, "DATA.BATCH_SIZE", "2")
    said = capsys.readouterr().out
    assert "synco with vit_nano: " in said and "estimated end: " in said
    assert ("starting from " in said) == (name == "continued")
    assert not (tmp_path / "out").exists()
    micro_batches = load_config(name).TRAIN.ACCUMULATION_STEPS or 1
    assert f" {2 * micro_batches} images each" in said
