"""The k-NN accuracy during training: what it measures, and that it changes nothing."""

import json
import logging
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers import arguments, assert_same, run_forked, spawn, weights

import eval_knn
import main_pretrain
from data.opening import DataPath, open_train
from evaluation.knn_monitor import KnnMonitor
from utils.config import load_config
from utils.errors import UserError
from utils.update import Precision

SMALL = ("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0")


def figures(folder) -> dict[int, float]:
    """The accuracy after each epoch that has one."""
    lines = (folder / "run/default/metrics.jsonl").read_text().splitlines()
    return {x["epoch"]: x["knn"] for x in map(json.loads, lines) if "knn" in x}


def monitor(imagenet, *opts) -> KnnMonitor:
    device = torch.device("cpu")
    config = load_config("configs/demo.yaml", [*SMALL, "TRAIN.KNN_FREQ", "1", *opts])
    config.DATA.DATA_PATH = str(imagenet)
    logger = logging.getLogger("monitor")
    run = SimpleNamespace(device=device, precision=Precision("O0", device), logger=logger)
    return KnnMonitor(config, open_train(DataPath.of(config)), run)


class MeanColour(torch.nn.Module):
    """The mean of each channel."""

    def forward(self, images):
        assert not self.training
        return images.mean((2, 3))


@pytest.fixture
def colours(tmp_path):
    """Two classes that differ in colour: 12 and 4 training images, 4 and 4 others."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (12, 4)), ("val", (4, 4))):
        for number, (count, colour) in enumerate(zip(counts, (40, 200), strict=True)):
            folder = tmp_path / split / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.full((40, 40, 3), (colour, 120, 240 - colour), np.uint8)
                image[:20] += rng.integers(0, 10, (20, 40, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), image)
    return tmp_path


def test_training_goes_on_as_without_it(run_main, imagenet, tmp_path):
    """Weights bit for bit; every second epoch and after the last; also after a resume."""
    opts = ("TRAIN.EPOCHS", "3", "SAVE_FREQ", "1")
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "without", *opts))
    opts += ("TRAIN.KNN_FREQ", "2")
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "with", *opts))
    assert_same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    assert weights(tmp_path / "without")["rng_state"].equal(weights(tmp_path / "with")["rng_state"])
    assert figures(tmp_path / "without") == {}
    measured = figures(tmp_path / "with")
    assert set(measured) == {1, 2}

    folder = tmp_path / "again" / "run" / "default"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "with/run/default/ckpt_epoch_0.pth", folder / "checkpoint.pth")
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "again", *opts))
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "again"))
    assert figures(tmp_path / "again") == measured
    assert f"knn {measured[2]:.4f}" in (folder / "log_rank0.txt").read_text()


def test_it_is_the_accuracy_of_eval_knn(run_main, imagenet, tmp_path):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.KNN_FREQ", "2")
    run_main(main_pretrain, *opts)
    run_main(eval_knn, *opts[:6], "--nb-knn", "20", *opts[6:])
    found = json.loads((tmp_path / "run/default/knn_imagenet/results.json").read_text())
    assert figures(tmp_path) == {1: pytest.approx(found["knn"]["20"]["top1"] / 100)}


def test_colours_are_told_apart_and_modes_restored(process_group, colours):
    for training in (True, False):
        encoder = MeanColour().train(training)
        assert monitor(colours).after(0, encoder) == {"knn": 1.0}
        assert encoder.training == training
    rare = monitor(colours, "TRAIN.KNN_FREQ", "3", "TRAIN.EPOCHS", "8")
    due = [epoch for epoch in range(8) if rare.after(epoch, encoder)]
    assert due == [2, 5, 7]
    assert monitor(colours, "TRAIN.KNN_FREQ", "0").after(0, encoder) == {}


def test_bad_images_are_left_out(process_group, colours):
    """A bad one does not count, whichever class it is of; with none left there is no figure."""
    for path in (colours / "val/class1/0.png", colours / "train/class1/2.png"):
        path.write_bytes(b"no image")
    images = monitor(colours)
    assert images.after(0, MeanColour()) == {"knn": 1.0}
    _, labels = images._encode(MeanColour().eval(), images.val)
    assert labels.tolist() == [0] * 4 + [1] * 3
    for path in (colours / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    assert np.isnan(images.after(0, MeanColour())["knn"])


def test_large_sets_are_thinned_evenly(process_group, colours, monkeypatch):
    monkeypatch.setattr("evaluation.knn_monitor.MOST_TRAIN", 8)
    images = monitor(colours)
    _, labels = images._encode(MeanColour().eval(), images.train)
    assert labels.tolist() == [0] * 6 + [1] * 2  # of 12 and 4
    assert images.after(0, MeanColour()) == {"knn": 1.0}


def test_a_missing_split_is_named_at_the_start(run_main, imagenet, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(imagenet / "train")
    with pytest.raises(UserError, match=r"TRAIN\.KNN_FREQ: .*no folder val/"):
        run_main(main_pretrain, *arguments("moby", data, tmp_path, "TRAIN.KNN_FREQ", "1"))
    assert not (tmp_path / "run/default/checkpoint.pth").exists()


def of_two(rank: int, folder: str, imagenet: str) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    torch.save(monitor(imagenet).after(0, encoder), f"{folder}/{rank}.pth")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(process_group, imagenet, tmp_path):
    spawn(of_two, 2, str(tmp_path), str(imagenet))
    of_two(2, str(tmp_path), str(imagenet))
    one, other, alone = (torch.load(tmp_path / f"{i}.pth") for i in range(3))
    assert one == other == alone


@pytest.mark.slow
def test_two_processes_train_with_it(imagenet, tmp_path):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.KNN_FREQ", "1")
    done = run_forked("main_pretrain.py", *opts, processes=2)
    assert done.returncode == 0, done.stdout
    assert set(figures(tmp_path)) == {0, 1}


@pytest.mark.parametrize("empty", ["train", "val"])
def test_without_a_readable_image_there_is_no_accuracy(imagenet, process_group, empty):
    made = monitor(imagenet)
    encode = made._encode

    def none_of(encoder, images):
        features, labels = encode(encoder, images)
        return (features[:0], labels[:0]) if images is getattr(made, empty) else (features, labels)

    made._encode = none_of
    assert np.isnan(made.after(0, MeanColour())["knn"])
