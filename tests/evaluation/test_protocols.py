"""What each protocol trains with, against loops that are written out here; what is held out."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import eval_linear
from data.loader import normalize
from evaluation.linear import LinearClassifiers
from evaluation.logistic_regression import choose_strength
from evaluation.protocols import hold_out, set_aside
from utils.arguments import given_keys, parse_arguments
from utils.errors import UserError
from utils.update import Update

TINY = ["MODEL.ENCODER", "vit_nano", "MODEL.NAME", "run", "DATA.IMG_SIZE", "32"]
TINY += ["DATA.NUM_WORKERS", "0", "PRINT_FREQ", "1"]
EPOCHS, UPDATES, BATCH = 4, 3, 8  # of 24 images


@dataclass(frozen=True)
class Published:
    """What the published probes train with; rates are for the images of an update.

    Attributes:
        rate, first, last: the highest rate, the one at which the warm-up begins, and the last.
        epochs, warmup: and their warm-up.
        by_epoch: the rate changes with the epoch alone.
        smoothing: of labels.
        clip: largest norm of the gradient.
        nesterov: momentum of 0.9.
        train_mode: of the encoder.
        blocks: whose class tokens are joined.
        resize: of test images.
    """

    rate: float
    first: float
    last: float
    epochs: int
    warmup: int
    by_epoch: bool
    smoothing: float
    clip: float
    nesterov: bool
    train_mode: bool
    blocks: int
    resize: str

    def at(self, update: int, rate: float, epochs: int, warmup: int) -> float:
        """The rate of an update of a run with other epochs."""
        update = update // UPDATES * UPDATES if self.by_epoch else update
        if update < warmup * UPDATES:
            return self.first + update * (rate - self.first) / (warmup * UPDATES)
        cosine = (1 + math.cos(math.pi * update / (epochs * UPDATES))) / 2
        return self.last + (rate - self.last) * cosine


IMAGES = BATCH / 512
PUBLISHED = {
    # Transformer-SSL: moby_linear.py, config.py, data/build.py
    "moby": Published(1.0 * IMAGES, 5e-7 * IMAGES, 5e-6 * IMAGES, 100, 5, False, 0.1, 5.0, True,
                      True, 0, "bilinear"),
    # this project's version 0.1
    "plain": Published(1.0 * IMAGES, 0, 0, 100, 5, False, 0.0, math.inf, True, False, 0, "bicubic"),
    # dino: eval_linear.py
    "dino": Published(0.001 * BATCH / 256, 0, 0, 100, 0, True, 0.0, math.inf, False, False, 4,
                      "bicubic"),
}  # fmt: skip


def command(data, output, *flags, opts=()):
    cfg = ["--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", data, "--output", output]
    return [str(a) for a in [*cfg, "--random-weights", *flags, "--opts", *TINY, *opts]]


def configured(*flags, opts=()):
    """The configuration of a probe, and the rates of its heads."""
    given = command("d", "o", *flags, opts=opts)
    args, config = parse_arguments("", eval_linear.add_arguments, given)
    protocol = eval_linear.choose_protocol(args, config.LINEAR_EVAL.WEIGHTS)
    return eval_linear.apply_protocol(config, protocol, given_keys(args), args.lr)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_are_those_of_the_published_probe(name):
    published = PUBLISHED[name]
    config, rates = configured("--protocol", name)
    train = config.TRAIN
    assert (published.epochs, published.warmup) == (train.EPOCHS, train.WARMUP_EPOCHS)
    assert rates[0] * IMAGES == pytest.approx(published.rate) and len(rates) == 1
    assert pytest.approx(published.first) == train.WARMUP_LR * IMAGES
    assert pytest.approx(published.last) == train.MIN_LR * IMAGES
    assert (train.CLIP_GRAD or math.inf) == published.clip
    assert published.smoothing == config.MODEL.LABEL_SMOOTHING
    assert published.resize == config.DATA.INTERPOLATION
    assert (train.OPTIMIZER.NAME, train.OPTIMIZER.MOMENTUM) == ("sgd", 0.9)
    assert (train.WEIGHT_DECAY, train.LR_SCHEDULER.NAME) == (0, "cosine")
    # the command line comes first
    opts = ["TRAIN.EPOCHS", "3", "MODEL.LABEL_SMOOTHING", "0.7", "TRAIN.BASE_LR", "0.5"]
    config, rates = configured("--protocol", name, opts=opts)
    assert (config.TRAIN.EPOCHS, config.MODEL.LABEL_SMOOTHING, rates) == (3, 0.7, [0.5])
    assert configured("--protocol", name, "--lr", "0.1", "10")[1] == [0.1, 10.0]


def test_mobys_is_the_default_and_dinos_has_a_batch():
    assert configured() == configured("--protocol", "moby")
    sizes = [configured("--protocol", name)[0].DATA.BATCH_SIZE for name in PUBLISHED]
    assert sizes == [64, 64, 128]
    assert configured("--protocol", "dino", "--batch-size", "16")[0].DATA.BATCH_SIZE == 16


def test_fine_tuning_is_that_of_mae():
    weights = ["LINEAR_EVAL.WEIGHTS", "finetune"]
    config, rates = configured(opts=weights)
    tuned = config.TRAIN
    assert (tuned.OPTIMIZER.NAME, tuned.WEIGHT_DECAY, rates) == ("adamw", 0.05, [2e-3])
    assert (tuned.WARMUP_LR, tuned.MIN_LR, tuned.CLIP_GRAD) == (0, 1e-6, 0)
    assert (tuned.EPOCHS, tuned.WARMUP_EPOCHS, config.MODEL.LABEL_SMOOTHING) == (100, 5, 0.1)
    assert config.DATA.INTERPOLATION == "bicubic"
    config, _ = configured(opts=[*weights, "TRAIN.WEIGHT_DECAY", "0.3"])
    assert config.TRAIN.WEIGHT_DECAY == 0.3


@pytest.fixture
def watched(monkeypatch):
    """What a probe's updates see: the model, its first head, and features, images and targets."""
    seen = {"batches": [], "features": []}
    make, features = Update.__call__, LinearClassifiers.features

    def update(self, micro_batches, forward):
        model = self.ddp.module
        if "model" not in seen:
            seen["model"] = model
            seen["start"] = [p.detach().clone() for p in model.heads[0].parameters()]
        seen["batches"] += micro_batches
        result = make(self, micro_batches, forward)
        seen["train_mode"] = model.encoder.training
        return result

    def of_images(self, images):
        found = features(self, images)
        if self.heads.training and not torch.is_inference_mode_enabled():
            seen["features"].append(found)
        return found

    monkeypatch.setattr(Update, "__call__", update)
    monkeypatch.setattr(LinearClassifiers, "features", of_images)
    return seen


@pytest.mark.parametrize("lr", [None, 30.0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_probe_trains_as_published(run_main, imagenet, tmp_path, watched, name, lr):
    """Its head after a few updates, from the same features."""
    published = PUBLISHED[name]
    warmup = min(published.warmup, 1)
    flags = ["--protocol", name]
    opts = ["TRAIN.EPOCHS", EPOCHS, "TRAIN.WARMUP_EPOCHS", warmup, "DATA.BATCH_SIZE", BATCH]
    if lr:  # the rates of the ends, which are small, stay those of a lower one
        flags += ["--lr", lr]
        opts += ["TRAIN.WARMUP_LR", 0.2, "TRAIN.MIN_LR", 0.3]
        published = replace(published, first=0.2 * IMAGES, last=0.3 * IMAGES)
    run_main(eval_linear, *command(imagenet, tmp_path, *flags, opts=opts))
    assert watched["train_mode"] == published.train_mode
    assert len(watched["features"]) == EPOCHS * UPDATES

    weight, bias = watched["start"]
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    norms = []
    rate = published.rate if lr is None else lr * IMAGES
    for update, (features, (_, targets)) in enumerate(
        zip(watched["features"], watched["batches"], strict=True)
    ):
        scores = features @ weight.T + bias
        wanted = torch.full_like(scores, published.smoothing / scores.shape[1])
        wanted[range(BATCH), targets] += 1 - published.smoothing
        slopes = (scores.softmax(1) - wanted) / BATCH  # of the mean cross-entropy
        gradients = [slopes.T @ features, slopes.sum(0)]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        now = published.at(update, rate, EPOCHS, warmup)
        for parameter, moment, gradient in zip((weight, bias), moments, gradients, strict=True):
            gradient = gradient * min(1, published.clip / norms[-1])
            moment.mul_(0.9).add_(gradient)
            step = gradient + 0.9 * moment if published.nesterov else moment
            parameter.sub_(now * step)
    if lr and name == "moby":
        assert max(norms) > published.clip
    torch.testing.assert_close(list(watched["model"].heads[0].parameters()), [weight, bias],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    written = tmp_path / "run/default/linear_imagenet_linprob/results.json"
    assert json.loads(written.read_text())["protocol"]["name"] == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_probe_sees_what_the_published_one_does(run_main, imagenet, tmp_path, watched, name):
    published = PUBLISHED[name]
    opts = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "DATA.BATCH_SIZE", BATCH]
    run_main(eval_linear, *command(imagenet, tmp_path, "--protocol", name, opts=opts))
    encoder = watched["model"].encoder.eval()
    images, outputs = normalize(watched["batches"][0][0]), []
    hooks = [
        b.register_forward_hook(lambda *given: outputs.append(given[2])) for b in encoder.blocks
    ]
    with torch.no_grad():
        expected = encoder(images)
        if published.blocks:
            last = outputs[-published.blocks :]
            expected = torch.cat([encoder.norm(tokens)[:, 0] for tokens in last], 1)
    for hook in hooks:
        hook.remove()
    same = torch.allclose(watched["features"][0], expected, atol=1e-5)
    assert same != published.train_mode  # stochastic depth
    assert watched["features"][0].shape == expected.shape


def test_a_part_of_each_class_is_held_out():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 25)
    held_out = hold_out(labels, 0, 5)
    assert torch.bincount(labels[held_out]).tolist() == [10, 2, 5]
    assert not held_out.equal(hold_out(labels, 1, 5))
    assert held_out.equal(hold_out(labels, 0, 5))
    labels = torch.arange(60) % 3
    assert torch.bincount(labels[hold_out(labels, 0, 10)]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("every", [2, 5, 10])
def test_the_last_image_of_a_class_is_never_held_out(every, caplog):
    """For any sizes of classes, and for several labels an image; what has none is counted."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 12, 8)
        labels = torch.arange(8).repeat_interleave(torch.from_numpy(sizes))
        several = torch.from_numpy(rng.random((30, 8)) < 0.06).long()
        for targets, has in ((labels, torch.nn.functional.one_hot(labels)), (several, several)):
            caplog.clear()
            held_out = hold_out(targets, seed, every)
            trained, chosen, there = (p.any(0) for p in (has[~held_out], has[held_out], has))
            assert trained[there].all()
            none = int((there & ~chosen).sum())
            assert [record.args[0] for record in caplog.records] == ([none] if none else [])
    with pytest.raises(UserError, match="no class has a second image to hold out"):
        set_aside(Numbered(range(5)), 0)
    with pytest.raises(UserError, match="no class has a second image to choose the strength by"):
        choose_strength(torch.randn(5, 2), torch.arange(5), 5, "top1", [1.0], 0)


class Numbered:
    """Images whose pixels are their numbers."""

    def __init__(self, labels):
        self.labels, self.classes = np.asarray(labels), ["a", "b"]
        self.names = [f"image {i}" for i in range(len(labels))]

    def read_image(self, index):
        return Image.new("RGB", (1, 1), (index, 0, 0))


def test_what_is_set_aside_is_not_trained_on():
    source = Numbered([0, 1] * 20)
    kept, aside = set_aside(source, 3)
    assert (len(kept.names), len(aside.names)) == (36, 4)
    assert sorted([*kept.names, *aside.names]) == sorted(source.names)
    assert aside.labels.tolist().count(0) == aside.labels.tolist().count(1) == 2
    for part in (kept, aside):
        assert part.classes == source.classes
        for i, name in enumerate(part.names):
            number = part.read_image(i).getpixel((0, 0))[0]
            assert name == f"image {number}" and part.labels[i] == source.labels[number]


def test_images_with_several_labels_are_set_aside():
    kept, aside = set_aside(Numbered(np.eye(20, 2, dtype=np.int64)), 0)
    assert kept.labels.shape == (18, 2) and aside.labels.shape == (2, 2)
