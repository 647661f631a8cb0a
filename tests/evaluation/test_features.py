"""The feature extractor, and the labelled views of classification."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, spawn
from torch import nn
from torch.utils.data import Dataset

import evaluation.features
from data.loader import build_classification_loader
from data.opening import DataPath, open_splits, open_train
from evaluation.features import check_features, encode_images, extract_features
from utils.config import load_config
from utils.errors import UserError
from utils.update import Precision

CPU = torch.device("cpu")


class Numbered(Dataset):
    """Image i is of the value i, its label 10 i; several labels an image on demand."""

    def __init__(self, count, several=False):
        self.count, self.several = count, several

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = torch.tensor([10 * index, 1]) if self.several else 10 * index
        return torch.full((3, 2, 2), index, dtype=torch.uint8), label


class Brightness(nn.Module):
    """The mean of the red channel in its first feature."""

    def forward(self, images):
        self.kept_gradient = torch.is_grad_enabled()
        return torch.stack([images[:, 0].mean((1, 2)), torch.ones(len(images))], 1)


def extract(count, several=False, **options):
    run = SimpleNamespace(device=CPU, precision=Precision("O0", CPU))
    options = {"batch_size": 4, "num_workers": 0, "normalize": False} | options
    return extract_features(Brightness(), Numbered(count, several), run, **options)


def assert_in_order(features, labels, count):
    assert labels.tolist() == [10 * i for i in range(count)]
    values = features[:, 0] * 0.229 * 255 + 0.485 * 255
    torch.testing.assert_close(values, torch.arange(float(count)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_once_in_order(count, workers):
    assert_in_order(*extract(count, num_workers=workers), count)


def test_features_are_of_unit_length_on_demand():
    features, _ = extract(5, normalize=True)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_several_labels_an_image():
    _, labels = extract(5, several=True)
    assert labels.tolist() == [[10 * i, 1] for i in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_gather_all_images_in_order(tmp_path, processes):
    spawn(_gather, processes, str(tmp_path))


def _gather(rank: int, folder: str) -> None:
    for count in (7, 12, 4):
        assert_in_order(*extract(count), count)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "one row of features"),
        (torch.zeros(3, 2), torch.zeros(2), "one row of features"),
        (torch.zeros(0, 2), torch.zeros(0), "no test features"),
        (torch.tensor([[0.0], [float("inf")]]), torch.zeros(2), "image 1 are not finite"),
    ],
)
def test_bad_features_are_refused(features, labels, message):
    with pytest.raises(UserError, match=message):
        check_features(features, labels, "test")


@pytest.mark.parametrize("weights", ["freeze", "finetune"])
def test_training_views_follow_from_seed_epoch_and_image(imagenet, weights):
    """Whatever the workers, and whatever was drawn before."""
    seen = []
    for workers, seed in ((0, 0), (2, 0), (0, 1)):
        opts = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "5", "LINEAR_EVAL.WEIGHTS", weights]
        opts += ["DATA.NUM_WORKERS", str(workers), "SEED", str(seed)]
        config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
        config.DATA.DATA_PATH = str(imagenet)
        source = open_train(DataPath.of(config))
        loader = build_classification_loader(config, source)
        torch.manual_seed(workers)
        epochs = []
        for epoch in (0, 1):
            loader.start_at(epoch)
            batches = [batch for (batch,) in loader]
            order = [i for b in loader.batch_sampler for _, i in b]
            labels = torch.cat([label for _, label in batches]).tolist()
            assert labels == source.labels[order].tolist()
            images = torch.cat([image for image, _ in batches])
            epochs.append(images[torch.tensor(order).argsort()])
        seen.append(epochs)
    dtype = torch.uint8 if weights == "freeze" else torch.float32
    assert seen[0][0].dtype == dtype and seen[0][0].shape == (20, 3, 32, 32)
    for epoch in (0, 1):
        assert seen[0][epoch].equal(seen[1][epoch])
        assert not seen[0][epoch].equal(seen[2][epoch])
    assert not seen[0][0].equal(seen[0][1])


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 2, 4]), (1, [1, 3, 0])])
def test_each_process_encodes_its_share(monkeypatch, rank, expected):
    """Every second image, and as many as the other process: the first comes once more."""
    monkeypatch.setattr(evaluation.features, "world_size", lambda: 2)
    monkeypatch.setattr(evaluation.features, "rank", lambda: rank)
    monkeypatch.setattr(evaluation.features, "_interleave", lambda own, total, run: (own, total))
    images = [(torch.full((3, 2, 2), i, dtype=torch.uint8), i) for i in range(5)]
    run = SimpleNamespace(device=CPU, precision=Precision("O0", CPU))
    (_, total), (labels, _) = extract_features(
        lambda batch: batch.mean((2, 3)), images, run, batch_size=2, num_workers=0
    )
    assert labels.tolist() == expected and total == 5


@pytest.mark.parametrize(("rank", "tty", "hidden"), [(0, 1, False), (0, 0, True), (1, 1, True)])
def test_one_process_shows_its_progress(monkeypatch, rank, tty, hidden):
    seen = {}
    monkeypatch.setattr("utils.distributed.rank", lambda: rank)
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty, raising=False)
    monkeypatch.setattr(
        evaluation.features, "tqdm", lambda loader, **options: seen.update(options) or loader
    )
    run = SimpleNamespace(device=CPU, precision=Precision("O0", CPU))
    images = [(torch.zeros(3, 2, 2, dtype=torch.uint8), 0)]
    extract_features(lambda b: b.mean((2, 3)), images, run, batch_size=1, num_workers=0, label="x")
    assert seen == {"desc": "x", "disable": hidden, "leave": False}


@pytest.mark.parametrize("normalize", [None, True])
def test_images_are_encoded_as_the_configuration_says(imagenet, monkeypatch, normalize):
    """And data workers leave signals to their process."""
    opts = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "5", "DATA.NUM_WORKERS", "0"]
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    config.DATA.DATA_PATH = str(imagenet)
    shielded, sizes = [], []
    monkeypatch.setattr(evaluation.features, "shield_workers", shielded.append)
    run = SimpleNamespace(device=CPU, precision=Precision("O0", CPU))

    def encoder(images):
        sizes.append(tuple(images.shape))
        return 3 + images.mean((2, 3))

    more = {} if normalize is None else {"normalize": normalize}
    source = open_splits(DataPath.of(config))[1]
    features, labels = encode_images(config, encoder, source, run, **more)
    assert sizes == [(5, 3, 32, 32), (2, 3, 32, 32)] and len(shielded) == 1
    assert labels.tolist() == source.labels.tolist()
    unit = torch.allclose(features.norm(dim=1), torch.ones(7), atol=1e-5)
    assert unit == bool(normalize)
