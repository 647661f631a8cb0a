"""eval_knn.py: figures from images and from files, processes, and mistakes."""

import argparse
import json
import shutil
from functools import partial

import pytest
import timm
import torch
from helpers import ROOT, figures, reference, run_forked, run_script
from PIL import Image

import eval_knn
from tools.make_tiny_transfer import write_tiny
from utils.errors import UserError

TINY = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"]
TINY += ["MODEL.ENCODER", "vit_nano", "MODEL.NAME", "run"]


def arguments(data, output, *flags, opts=()):
    return [
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--output", output),
        *(["--data-path", data] if data else []),
        *(*flags, "--opts", *TINY, *opts),
    ]


def results(output, dataset="imagenet"):
    return figures(output / f"run/default/knn_{dataset}/results.json")


@pytest.fixture
def features(tmp_path):
    """A folder of the published features."""
    folder = tmp_path / "features"
    folder.mkdir()
    arrays = reference("knn.npz")
    for file, name in {
        "trainfeat": "train_features",
        "trainlabels": "train_labels",
        "testfeat": "test_features",
        "testlabels": "test_labels",
    }.items():
        torch.save(torch.from_numpy(arrays[name]), folder / f"{file}.pth")
    return folder


def test_published_features_give_the_published_figures(run_main, features, tmp_path):
    """With neither a checkpoint nor images."""
    expected = reference("knn.json")["top1_top5_percent_by_k"]
    flags = ["--load-features", features, "--nb-knn", *expected, "--temperature", "0.07"]
    run_main(eval_knn, *arguments(None, tmp_path, *flags))
    found = results(tmp_path)
    assert set(found) == {"dataset", "temperature", "knn", "protocol"}
    assert found["temperature"] == 0.07 and found["protocol"] == {}
    assert {k: [v["top1"], v["top5"]] for k, v in found["knn"].items()} == expected


def test_a_baseline_needs_no_weights(run_main, imagenet, tmp_path):
    """An image is its own nearest neighbour by its pixels, so training images judge themselves."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(imagenet / "train")
    flags = ["--baseline", "raw_pixels", "--nb-knn", "1"]
    run_main(eval_knn, *arguments(data, tmp_path, *flags))
    found = json.loads((tmp_path / "run/default/knn_imagenet_raw_pixels/results.json").read_text())
    assert found["knn"]["1"]["top1"] == 100
    assert found["provenance"]["encoder"] == "raw_pixels"


def test_dumped_features_give_the_same_figures(run_main, imagenet, tmp_path):
    flags = ["--nb-knn", "1", "5", "24"]
    dump = ["--random-weights", "--dump-features", tmp_path / "dump"]
    run_main(eval_knn, *arguments(imagenet, tmp_path / "a", *flags, *dump))
    load = ["--load-features", tmp_path / "dump"]
    run_main(eval_knn, *arguments(None, tmp_path / "b", *flags, *load))
    assert results(tmp_path / "a") == results(tmp_path / "b")
    files = (tmp_path / "dump").glob("*.pth")
    shapes = {p.name: torch.load(p, weights_only=True).shape for p in files}
    assert shapes == {
        "trainfeat.pth": (24, 128),
        "trainlabels.pth": (24,),
        "testfeat.pth": (7, 128),
        "testlabels.pth": (7,),
    }


def test_classes_of_a_transfer_set_are_found(run_main, tmp_path):
    write_tiny("pets", str(tmp_path / "data"))
    flags = ["--dataset", "pets", "--random-weights", "--nb-knn", "1"]
    run_main(eval_knn, *arguments(tmp_path / "data", tmp_path, *flags))
    found = results(tmp_path, "pets")
    assert found["dataset"] == "pets"
    assert found["knn"]["1"]["top1"] > 50  # each class has a colour of its own


def test_pictures_come_after_the_figures(run_main, imagenet, tmp_path, monkeypatch):
    flags = ["--random-weights", "--nb-knn", "5", "1"]
    run_main(eval_knn, *arguments(imagenet, tmp_path / "a", *flags))
    run_main(eval_knn, *arguments(imagenet, tmp_path / "b", *flags, "--pictures"))
    found = results(tmp_path / "a")
    assert found == results(tmp_path / "b")
    log = (tmp_path / "a/run/default/knn_imagenet/log_rank0.txt").read_text()
    five = [f"{found['knn']['5'][name]:.2f}" for name in ("top1", "top5")]
    assert "\nk  top-1 %  top-5 %\n1 " in log and f"\n5    {five[0]}   {five[1]}\n" in log
    folder = tmp_path / "b/run/default/knn_imagenet/pictures"
    assert {path.name for path in folder.iterdir()} == {"neighbours.png", "confusion.png"}
    assert not (tmp_path / "a/run/default/knn_imagenet/pictures").exists()

    def fails(*_):
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(eval_knn, "draw", fails)
    run_main(eval_knn, *arguments(imagenet, tmp_path / "c", *flags, "--pictures"))
    assert results(tmp_path / "c") == results(tmp_path / "a")
    log = (tmp_path / "c/run/default/knn_imagenet/log_rank0.txt").read_text()
    assert "not all pictures could be drawn (RuntimeError: no room for it)\n" in log


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(imagenet, tmp_path):
    """7 and 24 images, of which neither 2 nor 3 processes with batches of 4 make equal parts."""
    root = tmp_path / "data"
    shutil.copytree(imagenet, root)
    (root / "train/class0/0.jpg").unlink()  # leaves 23
    found = []
    for processes in (0, 2, 3):
        output = tmp_path / str(processes)
        flags = ["--random-weights", "--nb-knn", "1", "5", "20", "--pictures"]
        # one by a launcher of torch
        run = partial(run_script, launcher="launch") if processes == 2 else run_forked
        done = run("eval_knn.py", *arguments(root, output, *flags), processes=processes)
        assert done.returncode == 0, done.stdout
        picture = Image.open(output / "run/default/knn_imagenet/pictures/confusion.png")
        found.append((results(output), picture.tobytes()))
    assert found[0] == found[1] == found[2]


def test_small_labels_and_features_of_half_precision_serve(run_main, features, tmp_path):
    damage(features, "trainlabels", lambda t: t.to(torch.int8))
    damage(features, "trainfeat", lambda t: t.double())
    run_main(eval_knn, *arguments(None, tmp_path, "--load-features", features, "--nb-knn", "5"))
    assert results(tmp_path)["knn"]["5"]["top1"] > 0


def test_features_of_any_length_give_the_same_figures(run_main, features, tmp_path):
    given = ["--load-features", features, "--nb-knn", "5"]
    run_main(eval_knn, *arguments(None, tmp_path / "a", *given))
    for name in ("trainfeat", "testfeat"):
        damage(features, name, lambda t: t * torch.linspace(0.5, 90, len(t))[:, None])
    run_main(eval_knn, *arguments(None, tmp_path / "b", *given))
    assert results(tmp_path / "a") == results(tmp_path / "b")
    log = (tmp_path / "b/run/default/knn_imagenet/log_rank0.txt").read_text()
    assert "the training features have other lengths: normalised" in log


def test_features_keep_the_encoder_that_they_are_of(run_main, imagenet, tmp_path):
    dump = ["--random-weights", "--dump-features", tmp_path / "dump", "--nb-knn", "1"]
    run_main(eval_knn, *arguments(imagenet, tmp_path / "a", *dump))
    load = ["--load-features", tmp_path / "dump", "--nb-knn", "1"]
    run_main(eval_knn, *arguments(None, tmp_path / "b", *load, opts=["SEED", "5"]))
    path = "run/default/knn_imagenet/results.json"
    made, read = (json.loads((tmp_path / n / path).read_text())["provenance"] for n in "ab")
    for name in ("weights", "key", "encoder", "data"):
        assert made[name] == read[name] is not None
    assert (made["seed"], read["seed"]) == (0, 5)
    with pytest.raises(UserError, match="dump: features of imagenet: give --dataset imagenet"):
        run_main(eval_knn, *arguments(None, tmp_path / "b", *load, "--dataset", "cifar10"))


def test_more_neighbours_than_images_are_refused_before_any_is_encoded(
    run_main, imagenet, tmp_path, monkeypatch
):
    monkeypatch.setattr(eval_knn, "encode_images", None)
    flags = ("--random-weights", "--nb-knn", "200")
    with pytest.raises(UserError, match="--nb-knn 200 is more than the 24 training images"):
        run_main(eval_knn, *arguments(imagenet, tmp_path, *flags))


def test_default_numbers_of_neighbours_are_those_that_fit(run_main, imagenet, tmp_path):
    run_main(eval_knn, *arguments(imagenet, tmp_path, "--random-weights"))
    assert list(results(tmp_path)["knn"]) == ["10", "20"]
    log = (tmp_path / "run/default/knn_imagenet/log_rank0.txt").read_text()
    assert "--nb-knn [10, 20]: there are 24 training images" in log
    assert eval_knn.neighbours(None, 7) == [7] and eval_knn.neighbours(None, 200) == eval_knn.KS


def damage(features, name, change):
    path = features / f"{name}.pth"
    torch.save(change(torch.load(path, weights_only=True)), path)


def with_nan(tensor):
    tensor[3, 1] = float("nan")
    return tensor


MISTAKES = {
    "k too large": (["--nb-knn", "701"], None, "--nb-knn 701 is more than the 700 training images"),
    "no neighbour": (["--nb-knn", "5", "0"], None, "--nb-knn: invalid number"),
    "temperature": (["--temperature", "0"], None, "--temperature: invalid number"),
    "temperature of NaN": (["--temperature", "nan"], None, "--temperature: invalid number"),
    "a subset of features": (["--subset", "0.5"], None, "--subset and --pictures need images"),
    "pictures of features": (["--pictures"], None, "--subset and --pictures need images"),
    "endless temperature": (["--temperature", "inf"], None, "--temperature: invalid number"),
    "labels": ([], ("testlabels", lambda t: t.float()), "labels must be dense whole numbers"),
    "kind": ([], ("trainfeat", lambda t: t.to(torch.float8_e4m3fn)), "must be dense real numbers"),
    "NaN": ([], ("trainfeat", with_nan), "the training features of image 3 are not finite"),
    "infinite": ([], ("testfeat", lambda t: t / 0), "the test features of image 0 are not finite"),
    "dimension": ([], ("testfeat", lambda t: t[:, 1:]), "have 32 values, test features 31"),
    "lengths": ([], ("trainlabels", lambda t: t[1:]), "one row of features and of labels"),
    "unknown class": ([], ("testlabels", lambda t: t + 5), "has no training image"),
    "several labels": ([], ("trainlabels", lambda t: t[:, None]), "one class an image"),
    "empty": ([], ("testfeat", lambda t: t[:0]), "one row of features and of labels"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_bad_features_are_named(run_main, features, tmp_path, mistake):
    flags, change, message = MISTAKES[mistake]
    if change:
        damage(features, *change)
    with pytest.raises(UserError) as error:
        run_main(eval_knn, *arguments(None, tmp_path, "--load-features", features, *flags))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_features_are_named(run_main, features, tmp_path):
    (features / "testfeat.pth").unlink()
    with pytest.raises(UserError, match=r"testfeat\.pth: no such file"):
        run_main(eval_knn, *arguments(None, tmp_path, "--load-features", features))


def test_a_set_of_several_labels_is_refused(run_main, tmp_path):
    write_tiny("voc2007", str(tmp_path / "data"))
    flags = ["--dataset", "voc2007", "--random-weights"]
    with pytest.raises(UserError, match=r"those of voc2007 have several: use eval_linear\.py"):
        run_main(eval_knn, *arguments(tmp_path / "data", tmp_path, *flags))


def test_a_missing_checkpoint_is_named(run_main, imagenet, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.pth: no such file"):
        run_main(eval_knn, *arguments(imagenet, tmp_path))


def test_a_class_without_training_images_is_named(run_main, imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "data")
    (tmp_path / "data/train/class1").rename(tmp_path / "data/train/other")
    with pytest.raises(UserError, match="class class1 is among the validation images"):
        run_main(eval_knn, *arguments(tmp_path / "data", tmp_path, "--random-weights"))


def test_a_vit_of_dino_has_the_figures_of_timms_own(run_main, imagenet, tmp_path):
    """A full checkpoint as DINO writes it, of the ViT-S with 6 heads, read as vit_small."""
    torch.manual_seed(0)
    real = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32)
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    other = torch.nn.init.normal_  # the student's differ
    student = {f"module.backbone.{k}": other(v.clone()) for k, v in real.state_dict().items()}
    head = {"mlp.0.weight": torch.ones(2, 2), "last_layer.weight_g": torch.ones(2, 1)}
    state = {
        "student": student | {f"module.head.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in real.state_dict().items()}
        | {f"head.{k}": v for k, v in head.items()},
        "optimizer": torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, output_dir=tmp_path),
        "dino_loss": {"center": torch.zeros(1, 2)},
        "fp16_scaler": {"scale": 65536.0},
    }
    torch.save(state, tmp_path / "dino.pth")
    found = {}
    for name in ("vit_small", "timm/vit_small_patch16_224"):
        out = tmp_path / name.replace("/", "_")
        flags = ["--pretrained", tmp_path / "dino.pth", "--nb-knn", "1", "5"]
        flags += ["--dump-features", out / "dump"]
        run_main(eval_knn, *arguments(imagenet, out, *flags, opts=("MODEL.ENCODER", name)))
        origin = json.loads((out / "run/default/knn_imagenet/results.json").read_text())
        assert origin["provenance"]["network"] == {"num_heads": 6, "patch_size": 16}
        assert origin["provenance"]["epoch"] == 100
        found[name] = results(out), torch.load(out / "dump/testfeat.pth", weights_only=True)
    (ours, features), (theirs, expected) = found.values()
    assert ours == theirs
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
