"""The entry ``provenance``: what it holds, and that nothing about git ends a run."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, arguments, figures, weights

import eval_knn
import main_pretrain
import utils.provenance
from utils.config import DEFAULTS, load_config
from utils.errors import UserError
from utils.provenance import cost, describe_images, gather_provenance, tensor_digest, weights_digest
from utils.run import Run, write_results, write_text
from utils.update import Precision

CPU = torch.device("cpu")
CONSTANT = {
    *("version", "commit", "modified", "source", "command", "config", "checkpoint", "weights"),
    *("method", "encoder", "key", "epoch", "step", "data", "seed", "precision", "processes"),
    *("device", "torch", "timm", "network"),
}
MOMENT = {"date", "seconds", "peak_memory_mb"}


def gather(**origin):
    config = load_config(str(ROOT / "configs/demo.yaml"), ["SEED", "7"])
    return gather_provenance(config, CPU, origin, None)


def git(folder, *words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c"}
    names |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
    return subprocess.run(
        ["git", *words], cwd=folder, env=environment | names, check=True, capture_output=True
    ).stdout.decode()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the code alone, whose root the module takes for its own."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    root = tmp_path / "code"
    root.mkdir()
    (root / "main_pretrain.py").write_text("print(1)\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "One")
    monkeypatch.setattr(utils.provenance, "ROOT", root)
    return root


def test_it_has_what_is_promised_and_is_plain_data(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--tag", "a b"])
    found = gather(method="synco", encoder="vit_nano", epoch=3, other="left out")
    assert set(found) == CONSTANT
    assert (found["method"], found["epoch"], found["step"]) == ("synco", 3, None)
    assert found["command"] == "eval_knn.py --tag 'a b'"
    assert (found["seed"], found["precision"], found["processes"]) == (7, "O0", 1)
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert found["version"] in (ROOT / "pyproject.toml").read_text()
    assert len(found["source"]) == 16 and len(found["config"]) == 64
    entry = found | cost(CPU, time.monotonic() - 5)
    assert set(entry) == CONSTANT | MOMENT
    assert 5 <= entry["seconds"] < 60 and entry["peak_memory_mb"] > 10
    assert json.loads(json.dumps(entry)) == entry


def test_only_tracked_files_modify_the_code(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert utils.provenance._commit() == {"commit": commit, "modified": False}
    (repository / "results.txt").write_text("untracked")
    assert utils.provenance._commit()["modified"] is False
    (repository / "main_pretrain.py").write_text("print(2)\n")
    assert utils.provenance._commit() == {"commit": commit, "modified": True}


def test_a_variable_of_a_hook_names_no_other_repository(repository, tmp_path, monkeypatch):
    commit = utils.provenance._commit()["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert utils.provenance._commit()["commit"] == commit


def no_git(_, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")


def no_repository(root, _):
    shutil.rmtree(root / ".git")


def no_commit(root, _):
    shutil.rmtree(root / ".git")
    git(root, "init", "-q")
    git(root, "add", ".")


def no_home(root, monkeypatch):
    monkeypatch.delenv("HOME")
    shutil.rmtree(root / ".git")


def somebody_elses(root, _):
    git(root, "rm", "-q", "--cached", "main_pretrain.py")


def damaged(root, _):
    (root / ".git/HEAD").write_bytes(b"\xff\xfe nonsense")


def dubious(root, monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", str(fake_git(root, "exit 128")))


def fake_git(root, line):
    folder = root.parent / "bin"
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{line}\n")
    (folder / "git").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "spoil", [no_git, no_repository, no_commit, no_home, somebody_elses, damaged, dubious]
)
def test_without_a_commit_there_is_the_source(repository, monkeypatch, spoil):
    spoil(repository, monkeypatch)
    assert utils.provenance._commit() == {"commit": None, "modified": None}
    assert len(gather()["source"]) == 16


def test_a_git_that_hangs_is_given_up(repository, monkeypatch):
    monkeypatch.setenv("PATH", f"{fake_git(repository, 'exec sleep 60')}:{os.environ['PATH']}")
    monkeypatch.setattr(utils.provenance, "GIT_SECONDS", 0.2)
    started = time.monotonic()
    assert utils.provenance._commit() == {"commit": None, "modified": None}
    assert time.monotonic() - started < 5


def test_names_and_labels_count_and_where_they_lie_does_not():
    def facts(root, names, labels):
        return describe_images(root, train=([f"{root}/{name}" for name in names], labels))

    names = ["train/a/1.jpg", "train/b/2.jpg"]
    first = facts("/data", names, [0, 1])
    assert first["images"] == {"train": 2}
    assert first == facts("/elsewhere/images", names, np.array([0, 1]))
    assert describe_images("./d/", train=([f"d/{n}" for n in names], [0, 1])) == first
    others = [facts("/data", names, [1, 1]), facts("/data", names[::-1], [0, 1])]
    others += [facts("/data", names, np.eye(2, dtype=int)), facts("/data", names[:1], [0])]
    others += [describe_images("", test=(names, [0, 1])), describe_images("", train=([], []))]
    digests = {facts["digest"] for facts in [first, *others]}
    assert len(digests) == 7
    assert describe_images("", train=(["\udcff", "\ud800"], []))["images"] == {"train": 2}


def test_a_digest_tells_weights_and_their_names_apart():
    layer = torch.nn.Linear(2, 2)
    digest = weights_digest(layer)
    assert digest == weights_digest(layer) and len(digest) == 64
    renamed = torch.nn.ModuleDict({"other": layer})
    assert weights_digest(renamed) != digest
    with torch.no_grad():
        layer.bias[0] += 1e-7
    assert weights_digest(layer) != digest


def test_a_digest_tells_tensors_apart():
    values = torch.arange(6)
    others = [values.view(2, 3), values.int(), values.flip(0), values[:0], values.bfloat16()]
    assert len({tensor_digest(tensor) for tensor in [values, *others]}) == 6
    assert tensor_digest(values.view(2, 3).T) == tensor_digest(values.view(2, 3).T.contiguous())


def run_in(folder):
    import logging

    return Run(str(folder), CPU, Precision("O0", CPU), logging.getLogger("results"), DEFAULTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_leave_the_results_before(tmp_path, value):
    write_results(run_in(tmp_path), {"top1": 3.0}, {"seed": 1})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["top1"] == 3.0 and set(results["provenance"]) == {"seed", *MOMENT}
    with pytest.raises(UserError, match=r"cannot write the results \(Out of range float"):
        write_results(run_in(tmp_path), {"top1": 4.0, "top5": value}, {})
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "config.json"}


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(str(tmp_path / "a.txt"), "before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="space"):
        write_text(str(tmp_path / "a.txt"), "after")
    with pytest.raises(UserError, match=r"results\.json: cannot write the results \(No space"):
        write_results(run_in(tmp_path), {}, {})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def test_a_checkpoint_and_what_is_made_of_it_say_where_they_come_from(run_main, imagenet, tmp_path):
    given = arguments("synco", imagenet, tmp_path, "SEED", "3", "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, *given)
    entry = weights(tmp_path)["provenance"]
    assert set(entry) == CONSTANT | MOMENT
    assert (entry["method"], entry["encoder"], entry["seed"]) == ("synco", "vit_nano", 3)
    assert (entry["epoch"], entry["step"], entry["weights"]) == (0, 6, None)
    assert entry["data"]["images"] == {"train": 24} and "main_pretrain.py" in entry["command"]
    folder = tmp_path / "run/default"
    said = utils.provenance.hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert entry["config"] == said

    for key in ("encoder", "encoder_k"):
        run_main(eval_knn, *given[:6], "--nb-knn", "5", "--key", key, *given[6:])
        path = folder / "knn_imagenet/results.json"
        found = json.loads(path.read_text())["provenance"]
        assert set(found) == CONSTANT | MOMENT | {"identity"}
        assert (found["key"], found["epoch"], found["step"]) == (key, 0, 6)
        assert (found["method"], found["encoder"]) == ("synco", "vit_nano")
        assert found["checkpoint"] == str(folder / "checkpoint.pth")
        assert len(found["weights"]) == 64
        assert found["data"]["images"] == {"train": 24, "test": 7}
        log = (folder / "knn_imagenet/log_rank0.txt").read_text()
        assert f"the encoder that is judged: {key} of epoch 0, after update 6" in log


def test_two_runs_are_equal_without_it(run_main, imagenet, tmp_path):
    given = ["--random-weights", "--nb-knn", "5"]
    found = []
    for name in "ab":
        arguments_ = arguments("moby", imagenet, tmp_path / name)
        run_main(eval_knn, *arguments_[:6], *given, *arguments_[6:])
        found.append(tmp_path / name / "run/default/knn_imagenet/results.json")
    assert figures(found[0]) == figures(found[1])
    one, two = (json.loads(path.read_text())["provenance"] for path in found)
    assert one["data"] == two["data"] and one["weights"] == two["weights"]
    assert one["command"] != two["command"]
