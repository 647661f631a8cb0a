"""Every command line in the documentation runs, on miniature data."""

import importlib
import re
import shlex
import shutil
import sys

import pytest
import torch
from helpers import ROOT, TINY, write_images, write_run

from data.transfer import TRANSFER_SETS
from models import build_method
from synco_vit.__main__ import COMMANDS as INSTALLED
from tools import make_tiny_davis, make_tiny_retrieval, make_tiny_transfer, pack_images
from utils.config import load_config, to_json

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# run by tests of their own, which set up what they need
ELSEWHERE = {
    "mocov3": "test_extending.py",
    "synco-embed": "test_load_encoder.py",
    "tools.benchmark": "test_benchmark.py",
    "tools.study": "test_study.py",
    "tools.report": "test_report.py",
}
SMALLER = {
    "tools.make_fake_imagenet": ["--train", "1", "--val", "1"],
    "tools.visualize": ["--images", "4"],
    "eval_knn.py": ["--nb-knn", "5"],
    "eval_video_seg.py": ["--short-side", "64"],
}


def commands() -> dict[str, list[str]]:
    """The words of each command of python, torchrun or the installed project, by its place."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    ((?:python|torchrun|synco-[a-z-]+) .*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if not any(key in words for key in ELSEWHERE):
                found[f"{document.name}-{len(found)}"] = words
    return found


COMMANDS = commands()


def test_the_documents_have_commands():
    text = " ".join(word for words in COMMANDS.values() for word in words)
    scripts = ["main_pretrain.py", *(p.name for p in ROOT.glob("eval_*.py"))]
    assert len(COMMANDS) > 25
    assert [s for s in scripts if s not in text] == []


@pytest.fixture(scope="module")
def places(imagenet, tmp_path_factory):
    """Where the words in capitals lie: data, run folders with a checkpoint, and zips."""
    root = tmp_path_factory.mktemp("documents")
    words = {"IMAGENET": imagenet, "OUT": root / "out", "ZIPS": root / "zips"}
    patch = pytest.MonkeyPatch()
    for tool, name, arguments in (
        (pack_images, "ZIPS", ["--zip", imagenet, root / "zips"]),
        (pack_images, "PACKED", [imagenet, root / "packed"]),
        (make_tiny_davis, "DAVIS", [root / "davis"]),
        (make_tiny_retrieval, "RETRIEVAL", [root / "retrieval"]),
        *((make_tiny_transfer, s, [s, root / s]) for s in ("cifar10", "flowers102")),
    ):
        patch.setattr(sys, "argv", [tool.__file__, *map(str, arguments)])
        tool.main()
        words[name] = arguments[-1]
    patch.undo()
    recipes = ("demo", "moby_swin_tiny", "moby_vit_small", "moby_vit_tiny", "synco_vit_small")
    for recipe in recipes:
        config = load_config(str(ROOT / f"configs/{recipe}.yaml"), TINY)
        for tag in ("TAG", "trained", "transformer"):
            folder = words["OUT"] / config.MODEL.NAME / tag
            folder.mkdir(parents=True)
            torch.save({"model": build_method(config).state_dict()}, folder / "weights.pth")
            if recipe == "synco_vit_small" and tag == "TAG":  # the only run of a folder of its own
                words["ONE"] = root / "one"
                own = words["ONE"] / config.MODEL.NAME / tag
                shutil.copytree(folder, own)
                (own / "weights.pth").rename(own / "checkpoint.pth")
                (own / "config.json").write_text(to_json(config))
    for run in ("synco", "moby"):
        write_run(words["OUT"] / run)
        (words["OUT"] / run / "config.json").write_text('{"SEED": 0}')
        words[f"OUT/{run}/TAG"] = words["OUT"] / run
        words[f"demo/runs/demo__{run}/trained"] = words["OUT"] / run
    write_images(root / "photos")
    return words | {"PHOTOS": root / "photos"}


def filled_in(words: list[str], places: dict, folder) -> tuple[str, list[str]]:
    """The module of a command, and its arguments on miniature data."""
    if words[0].startswith("synco-"):
        words = ["-m", "synco_vit", words[0].removeprefix("synco-"), *words[1:]]
    if "synco_vit" in words:  # the module that its command is
        at = words.index("synco_vit") + 1
        name = INSTALLED.get(words[at], words[at])
        words = [name if name.startswith("tools.") else f"{name}.py", *words[at + 1 :]]
    script = next(i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("tools."))
    if words[:2] == ["python", "-m"] and words[2].startswith("data."):
        script = 2
    module, arguments = words[script], [w for w in words[script + 1 :] if w != "--download"]
    sets = [w for w in arguments if w in TRANSFER_SETS and w in places]
    data_set = places["IMAGENET"]
    if sets:
        data_set = places[sets[0]]
    elif {"roxford5k", "rparis6k"} & set(arguments):
        data_set = places["RETRIEVAL"]
    elif "davis" in arguments:
        data_set = places["DAVIS"]
    elif "split_images" in module:  # it writes there
        data_set = folder / "new"
    values = places | {
        "DATA": data_set,
        "FOLDER": folder / "new",
        "demo/imagenet": places["IMAGENET"],
        "demo/runs": places["OUT"],
        "data/revisited_paris_oxford": places["RETRIEVAL"],
        "data/davis": places["DAVIS"],
    }
    knows_its_run = module.startswith("eval_") and "--cfg" not in arguments
    if knows_its_run:
        values["OUT"] = places["ONE"]
    # the names of transfer sets are keys of places, but stay; few images allow no large batch
    values = {k: v for k, v in values.items() if k not in TRANSFER_SETS} | {"128": 4}
    arguments = [str(values.get(w, w)) for w in arguments]
    if "--subset" in arguments:
        arguments[arguments.index("--subset") + 1] = "0.5"  # of few images, enough for an update
    arguments = [str(ROOT / w) if w.startswith("configs/") else w for w in arguments]
    if knows_its_run:
        arguments += [
            "--batch-size",
            "4",
            "--opts",
            "TRAIN.EPOCHS",
            "2",
            "TRAIN.WARMUP_EPOCHS",
            "1",
        ]
    if "--cfg" in arguments:
        at = arguments.index("--opts") + 1 if "--opts" in arguments else len(arguments)
        arguments[at:at] = TINY if "--opts" in arguments else ["--opts", *TINY]
        if not module.startswith("main") and "--pretrained" not in arguments:
            recipe = arguments[arguments.index("--cfg") + 1]
            tag = arguments[arguments.index("--tag") + 1] if "--tag" in arguments else "TAG"
            name = load_config(recipe, []).MODEL.NAME
            arguments += ["--pretrained", str(places["OUT"] / name / tag / "weights.pth")]
    return module, arguments + SMALLER.get(module, [])


@pytest.mark.slow
@pytest.mark.parametrize("place", COMMANDS)
def test_command_runs(run_main, places, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    name, arguments = filled_in(COMMANDS[place], places, tmp_path)
    run_main(importlib.import_module(name.removesuffix(".py")), *arguments)
