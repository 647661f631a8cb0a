"""What the heads of a probe have achieved, their losses, and mixup."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.loader import normalize
from data.transfer import DIFFICULT
from evaluation.linear import (
    LinearClassifiers,
    build_mixup,
    classification_loss,
    forward_images,
    read_classifiers,
    score_classifier,
)
from models.encoder import create_encoder
from models.patch_features import ClassTokens
from utils.config import DEFAULTS
from utils.errors import UserError

CPU = torch.device("cpu")


def figure(value: float, **more: float) -> dict[str, float]:
    return {"value": value, "top1": value, "top5": None, "loss": 1.0} | more


@pytest.fixture(scope="module")
def model() -> LinearClassifiers:
    torch.manual_seed(0)
    return LinearClassifiers(create_encoder("vit_nano", 32), 3, 2, seed=4, frozen=True)


def test_heads_begin_alike_and_small(model):
    first, second = model.heads
    assert first.weight.equal(second.weight) and not first.bias.any()
    assert float(first.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    other = LinearClassifiers(model.encoder, 3, 1, seed=5, frozen=True)
    assert not other.heads[0].weight.equal(first.weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_losses_of_images(model, smoothing):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        features = model.encoder.eval()(normalize(images))
    expected = [
        F.cross_entropy(h(features), targets, label_smoothing=smoothing) for h in model.heads
    ]
    found = forward_images(model, CPU, smoothing, None, [images, targets])
    torch.testing.assert_close(found.loss, torch.stack(expected))
    assert found.figures == {} and found.loss.requires_grad
    # images that are normalised already stay as they are
    same = forward_images(model, CPU, smoothing, None, [normalize(images), targets])
    torch.testing.assert_close(same.loss, found.loss)

    def swap(batch, labels):
        return batch.flip(0), F.one_hot(labels.flip(0), 3).float()

    mixed = forward_images(model, CPU, 0.0, lambda *given: swap(*given), [images, targets])
    # two dimensions after mixing are probabilities, not several labels
    plain = forward_images(model, CPU, 0.0, None, [images, targets])
    torch.testing.assert_close(mixed.loss, plain.loss)


def test_several_labels_leave_out_the_difficult():
    scores = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0]])
    targets = torch.tensor([[1, 0, DIFFICULT], [0, 1, 1]])
    p = scores.sigmoid()
    by_hand = -(p[0, 0].log() + (1 - p[0, 1]).log() + (1 - p[1, 0]).log() + p[1, 1:].log().sum())
    found = classification_loss(scores, targets, multi_label=True)
    torch.testing.assert_close(found, by_hand / 2)
    own = scores.log_softmax(1)
    plain = classification_loss(scores, torch.tensor([0, 1]))  # one label, no smoothing
    torch.testing.assert_close(plain, -(own[0, 0] + own[1, 1]) / 2)


@pytest.mark.parametrize("missing", ["lr", "epoch", "heads.0.bias"])
def test_what_is_no_probe_is_named(model, tmp_path, missing):
    state = {"model": model.state_dict(), "lr": [0.1, 1.0], "epoch": 3}
    path = str(tmp_path / "probe.pth")
    torch.save(state, path)
    read, found = read_classifiers(path, create_encoder("vit_nano", 32), 3)
    assert not read.training and found["epoch"] == 3 and len(read.heads) == 2
    assert read.heads[1].weight.equal(model.heads[1].weight)
    torch.save(state | {"class_tokens": "four"}, path)
    with pytest.raises(UserError, match="damaged, its class_tokens are four"):
        read_classifiers(path, create_encoder("vit_nano", 32), 3)
    state.pop(missing, None)
    state["model"].pop(missing, None)
    torch.save(state, path)
    with pytest.raises(UserError, match="not a checkpoint of linear classifiers"):
        read_classifiers(path, create_encoder("vit_nano", 32), 3)


def test_figures_of_one_classifier():
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    found = score_classifier(scores, torch.tensor([0, 1, 2]), "top1")
    assert found["value"] == found["top1"] == pytest.approx(100 / 3) and found["top5"] == 100
    expected = F.cross_entropy(scores, torch.tensor([0, 1, 2]))
    assert found["loss"] == pytest.approx(float(expected))
    several = score_classifier(scores, torch.eye(3).long(), "mAP")
    assert several["top1"] is None and several["top5"] is None and several["loss"] > 0
    assert score_classifier(scores / 0, torch.tensor([0, 1, 2]), "top1") is None


@pytest.mark.parametrize("off", ["MIXUP", "CUTMIX", None])
def test_mixup_is_on_if_one_of_its_kinds_is(off):
    config = DEFAULTS.clone()
    if off:
        config.AUG[off] = 0.0
    mixup = build_mixup(config, 7)
    assert mixup.num_classes == 7 and mixup.label_smoothing == 0.1
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (
        0.0 if off == "MIXUP" else 0.8,
        0.0 if off == "CUTMIX" else 1.0,
    )
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
    config.DATA.BATCH_SIZE = 7
    with pytest.raises(UserError, match="mixup pairs images"):
        build_mixup(config, 7)
    config.AUG.MIXUP = config.AUG.CUTMIX = 0.0
    assert build_mixup(config, 7) is None
    config.AUG.CUTMIX_MINMAX = [0.2, 0.8]
    config.DATA.BATCH_SIZE = 8
    assert build_mixup(config, 7).cutmix_minmax == [0.2, 0.8]


def test_rates_fall_from_the_heads_down():
    """By a factor a block; weight decay skips biases, norms and what the encoder names."""
    tuned = LinearClassifiers(create_encoder("vit_nano", 32), 3, 1, seed=0, frozen=False)
    names = {p: n for n, p in tuned.named_parameters()}
    rates, decays = {}, {}
    for group in tuned.layer_groups(0.3, 0.5):
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr_scale"]
            decays[names[parameter]] = group["weight_decay"]
    assert set(rates) == {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert rates["heads.0.weight"] == rates["heads.0.bias"] == 1.0
    blocks = [rates[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(5)]
    assert blocks == [0.5**n for n in (4, 3, 2, 1, 0)]
    assert rates["encoder.cls_token"] == 0.5**5 and "encoder.pos_embed" not in rates
    skipped = {n for n, decay in decays.items() if decay == 0}
    assert set(decays.values()) == {0.0, 0.3}
    assert {"heads.0.bias", "encoder.cls_token", "encoder.norm.weight"} <= skipped
    assert not skipped & {"heads.0.weight", "encoder.blocks.0.attn.qkv.weight"}


def test_each_head_of_a_probe_has_its_rate(model):
    groups = model.head_groups([0.1, 3.0], weight_decay=0.2, nesterov=False)
    assert [group["lr_scale"] for group in groups] == [0.1, 3.0]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2]
    assert [group["nesterov"] for group in groups] == [False, False]
    assert groups[1]["params"] == list(model.heads[1].parameters())


def test_a_frozen_encoder_stays_in_eval_mode(model):
    model.train()
    assert model.training and model.heads.training and not model.encoder.training
    assert not any(p.requires_grad for p in model.encoder.parameters())
    tuned = LinearClassifiers(create_encoder("vit_nano", 32), 3, 1, seed=0, frozen=False).train()
    assert tuned.encoder.training
    free = {n for n, p in tuned.encoder.named_parameters() if not p.requires_grad}
    assert free == {"pos_embed"}  # fixed positions stay
    assert not tuned.eval().encoder.training
    assert model.eval() is model


def test_statistics_are_frozen_with_the_encoder():
    """Stochastic depth acts, but BatchNorm takes and keeps its own statistics."""
    torch.manual_seed(0)
    encoder = create_encoder("timm/resnet18", 32, drop_path_rate=0.5)
    probe = LinearClassifiers(encoder, 3, 1, seed=0, frozen=True, drops=True).train()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:  # timm begins with blocks that add nothing
        torch.nn.init.ones_(norm.weight)
    assert encoder.training and norms and not any(norm.training for norm in norms)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(16, 3, 32, 32)
    assert not probe(images).equal(probe(images))
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    assert probe.eval()(images).equal(probe(images))


def test_heads_see_the_tokens_that_are_asked_for():
    encoder = create_encoder("vit_nano", 32)
    tokens = ClassTokens(2, patches=True)
    probe = LinearClassifiers(encoder, 3, 2, seed=0, frozen=True, tokens=tokens).eval()
    assert probe.heads[1].weight.shape == (3, 3 * 128)
    images = torch.randn(2, 3, 32, 32)
    assert probe.features(images).equal(tokens(encoder, images))
    expected = probe.heads[1](tokens(encoder, images))
    torch.testing.assert_close(probe(images)[1], expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_labels_are_smoothed_once(mixed):
    """By mixup, where it is on: timm's target has 0.1 off the class, and no more."""
    config = DEFAULTS.clone()
    config.DATA.BATCH_SIZE = 4
    mixup = build_mixup(config, 5) if mixed else None
    scores = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3])
    np.random.seed(0)
    found = forward_images(
        lambda images: scores, torch.device("cpu"), 0.1, mixup, [torch.zeros(4, 3, 8, 8), targets]
    )
    np.random.seed(0)
    soft = (
        mixup(torch.zeros(4, 3, 8, 8), targets)[1] if mixed else F.one_hot(targets, 5) * 0.9 + 0.02
    )
    assert soft.sum(1).allclose(torch.ones(4))
    expected = -(soft * scores[0].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found.loss, expected[None])
