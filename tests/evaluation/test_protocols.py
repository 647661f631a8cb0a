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
from evaluation.identity import differences
from evaluation.linear import LinearClassifiers
from evaluation.logistic_regression import choose_strength
from evaluation.protocols import MAE_V0_2, hold_out, identity_of, protocol_said, set_aside
from lr_scheduler import Rates, build_scheduler
from models.encoder import create_encoder
from utils.arguments import given_keys, parse_arguments
from utils.config import CLASSIFIER, FEATURE, FINE_TUNING, NETWORK, settings
from utils.errors import UserError
from utils.recipes import recipe_names
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
    protocol = eval_linear.choose_protocol(args, config, "o")
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


# FINETUNE.md of MAE's repository, by encoder: epochs, rate for 256 images, layer decay, drop path
MAE = {
    "vit_small": (100, 5e-4, 0.65, 0.1),
    "vit_base": (100, 5e-4, 0.65, 0.1),
    "timm/vit_large_patch16_224": (50, 1e-3, 0.75, 0.2),
    "vit_huge": (50, 1e-3, 0.75, 0.3),
}
TUNED = ["LINEAR_EVAL.WEIGHTS", "finetune"]


@pytest.mark.parametrize("encoder", MAE)
def test_fine_tuning_is_that_of_mae(encoder):
    epochs, rate, layer_decay, drop_path = MAE[encoder]
    opts = [*TUNED, "MODEL.ENCODER", encoder]
    args, asked = parse_arguments("", eval_linear.add_arguments, command("d", "o", opts=opts))
    protocol = eval_linear.choose_protocol(args, asked, "o")
    assert (protocol.name, protocol.layer_decay) == ("mae", layer_decay)
    assert protocol.drop_path_rate == drop_path
    config, rates = configured(opts=opts)
    tuned, aug = config.TRAIN, config.AUG
    assert (tuned.EPOCHS, tuned.WARMUP_EPOCHS, rates) == (epochs, 5, [2 * rate])
    assert (tuned.OPTIMIZER.NAME, tuned.WEIGHT_DECAY) == ("adamw", 0.05)
    assert tuned.OPTIMIZER.BETAS == (0.9, 0.999) and tuned.OPTIMIZER.EPS == 1e-8
    assert (tuned.WARMUP_LR, tuned.MIN_LR, tuned.CLIP_GRAD) == (0, 1e-6, 0)
    assert (config.MODEL.LABEL_SMOOTHING, config.DATA.INTERPOLATION) == (0.1, "bicubic")
    assert (aug.AUTO_AUGMENT, aug.COLOR_JITTER) == ("rand-m9-mstd0.5-inc1", 0)
    assert (aug.REPROB, aug.REMODE, aug.RECOUNT) == (0.25, "pixel", 1)
    mixed = (aug.MIXUP, aug.CUTMIX, aug.CUTMIX_MINMAX, aug.MIXUP_PROB, aug.MIXUP_SWITCH_PROB)
    assert mixed == (0.8, 1.0, None, 1.0, 0.5) and aug.MIXUP_MODE == "batch"
    config, _ = configured(opts=[*TUNED, "TRAIN.WEIGHT_DECAY", "0.3"])
    assert config.TRAIN.WEIGHT_DECAY == 0.3


def test_the_rate_of_mae_falls_after_its_warm_up_to_an_end_that_no_batch_scales():
    """util/lr_sched.py, written out; the layers' rates are multiples of it."""
    config, rates = configured(opts=[*TUNED, "TRAIN.EPOCHS", "8", "TRAIN.WARMUP_EPOCHS", "2"])
    layer = torch.nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr_scale": 0.65}, {"params": [layer.bias]}]
    rates = Rates(rates[0] * 64 / 512, 0, 1e-6)
    optimizer = torch.optim.AdamW(groups, rates.base)
    scheduler = build_scheduler(config, optimizer, rates, UPDATES, after_warmup=True)
    for update in range(8 * UPDATES):
        scheduler.step_update(update)
        epoch = update / UPDATES
        if epoch < 2:
            expected = rates.base * epoch / 2
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (8 - 2)))
            expected = 1e-6 + (rates.base - 1e-6) * cosine
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([0.65 * expected, expected])


def test_the_classifier_of_mae_sees_the_mean_of_the_patches():
    """models_vit.py, written out."""
    encoder = create_encoder("vit_nano", 32)
    torch.nn.init.normal_(encoder.norm.weight)
    model = LinearClassifiers(encoder, 3, 1, seed=0, frozen=False, as_mae=True).eval()
    images = torch.randn(2, 3, 32, 32)
    x = encoder.patch_embed(images).flatten(1, 2)
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), x], 1) + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x)
    x = torch.nn.functional.layer_norm(x[:, 1:].mean(1), (128,), eps=1e-6)
    head = model.heads[0]
    torch.testing.assert_close(model(images)[0], x @ head.weight.T + head.bias)
    assert 1e-5 < head.weight.std() < 3e-5 and not head.bias.any()
    model(images).sum().backward()
    learns = {n: p.grad is not None for n, p in model.named_parameters()}
    assert [n for n, learned in learns.items() if not learned] == [
        *("encoder.norm.weight", "encoder.norm.bias")
    ]
    decays = {id(p): g["weight_decay"] for g in model.layer_groups(0.05, 0.65) for p in g["params"]}
    names = {n for n, p in model.named_parameters() if p.ndim > 1 and decays.get(id(p)) == 0}
    assert names == {"encoder.pos_embed", "encoder.cls_token"}
    assert len(decays) == len(list(model.parameters())) - 2


def test_a_fine_tuning_of_version_0_2_keeps_its_protocol(tmp_path):
    """And says which it is; one that is begun now is MAE's, unless the old one is asked for."""
    state = {"model": {}, "epoch": 3, "protocol": "mae", "provenance": {"weights": "w"}}
    torch.save(state, tmp_path / "checkpoint.pth")
    assert protocol_said(state, frozen=False) is MAE_V0_2
    old = state | {"settings": {"TRAIN.OPTIMIZER.BETAS": (0.9, 0.999)}, "encoder": "w"}
    new = {"TRAIN.OPTIMIZER.BETAS": [0.9, 0.999], "weights": "w", "--protocol": "mae-v0.2"}
    assert differences(identity_of(old, frozen=False), new) == {}

    def chosen(*flags, folder=tmp_path):
        given = command("d", "o", *flags, opts=TUNED)
        args, config = parse_arguments("", eval_linear.add_arguments, given)
        return eval_linear.choose_protocol(args, config, str(folder)).name

    assert chosen() == "mae-v0.2" and chosen("--protocol", "mae") == "mae"
    assert chosen(folder=tmp_path / "new") == "mae"
    assert chosen("--protocol", "mae-v0.2", folder=tmp_path / "new") == "mae-v0.2"
    torch.save(state | {"provenance": {"identity": {"weights": "w"}}}, tmp_path / "checkpoint.pth")
    assert chosen() == "mae"


@pytest.mark.parametrize("opts", [[], TUNED], ids=["probe", "finetune"])
def test_all_recipes_of_an_encoder_are_judged_alike(opts):
    """What a classifier depends on follows from its protocol, not from the pre-training."""
    found = {}
    for name in recipe_names():
        words = ["--cfg", name, "--opts", "MODEL.ENCODER", "vit_nano", *opts]
        for flags in ([],) if opts else ([], ["--protocol", "plain"], ["--protocol", "dino"]):
            args, asked = parse_arguments("", eval_linear.add_arguments, [*flags, *words])
            protocol = eval_linear.choose_protocol(args, asked, "none")
            config, rates = eval_linear.apply_protocol(asked, protocol, given_keys(args), args.lr)
            same = settings(config, CLASSIFIER | FINE_TUNING)
            for key in settings({}, NETWORK | FEATURE):  # which follow from the encoder
                same.pop(key, None)
            found.setdefault(protocol.name, {})[name] = (same, rates)
    for protocol, by_recipe in found.items():
        first, *others = by_recipe.values()
        assert len(others) > 20 and all(other == first for other in others)
        batches = {"moby": 64, "plain": 64, "dino": 128, "mae": 32}
        assert first[0]["DATA.BATCH_SIZE"] == batches[protocol]


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
