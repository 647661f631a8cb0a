"""Backbones of timm: widths, options, BatchNorm over processes, and training with each method."""

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, spawn
from timm.layers import BatchNormAct2d
from torch import nn

from models import build_method
from models.batch_norm import has_batch_norm, synchronize_batch_norm
from models.encoder import create_encoder, create_timm_backbone
from models.patch_features import patch_features
from models.pretrained import load_encoder_weights
from optimizer import build_optimizer
from utils.config import load_config
from utils.distributed import data_parallel, rank
from utils.errors import UserError

METHODS = ("byol", "moby", "synco")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, batch_norm",
    [
        ("resnet18", True),
        ("resnet50.a1_in1k", True),
        ("convnext_atto", False),
        ("mobilenetv3_small_100", True),  # its num_features are not what it gives
        ("vit_tiny_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
    ],
)
def test_width_and_sizes(name, batch_norm):
    encoder = create_encoder(f"timm/{name}", img_size=64, drop_path_rate=0.1).eval()
    assert has_batch_norm(encoder) == batch_norm
    assert isinstance(encoder.no_weight_decay(), set)
    for size in ((64, 64), (96, 64)):
        with torch.no_grad():
            assert encoder(torch.randn(2, 3, *size)).shape == (2, encoder.num_features)
            grid = patch_features(encoder, torch.randn(1, 3, *size)).shape[1:3]
        assert grid == (size[0] // 16, size[1] // 16)


def test_options_reach_a_backbone_that_has_them():
    _, options = create_timm_backbone("timm/vit_tiny_patch16_224", img_size=64, drop_path_rate=0.3)
    assert options == {
        "img_size": 64,
        "drop_path_rate": 0.3,
        "dynamic_img_size": True,
        "dynamic_img_pad": True,
    }
    encoder = create_encoder("timm/vit_tiny_patch16_224", 64, drop_path_rate=0.3)
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    frozen = create_encoder("timm/vit_tiny_patch16_224", 64, stop_grad_conv1=True)
    assert not any(p.requires_grad for p in frozen.patch_embed.parameters())
    assert has_batch_norm(create_encoder("timm/vit_tiny_patch16_224", 64, replace_ln_with_bn=True))
    assert create_encoder("timm/resnet18", 64, use_checkpoint=True).grad_checkpointing


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet51", {}, r"timm/resnet51: timm has no such model, did you mean resnet51q"),
        ("zzzzzzzzzz", {}, r"timm has no such model, see timm\.list_models"),
        ("resnet18", {"stop_grad_conv1": True}, "MODEL.STOP_GRAD_CONV1: timm/resnet18 has no"),
        ("resnet18", {"replace_ln_with_bn": True}, "MODEL.REPLACE_LN_WITH_BN: timm/resnet18 has"),
        ("vgg11", {"use_checkpoint": True}, "TRAIN.USE_CHECKPOINT: timm/vgg11 has no"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        create_encoder(f"timm/{name}", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["caformer_s18", "hrnet_w18_small", "ese_vovnet19b_slim", "naflexvit_base_patch16_gap"]
)
def test_backbones_that_know_no_size_are_built(name):
    """Their constructors name all unknown arguments at once."""
    with torch.device("meta"):
        encoder = create_encoder(f"timm/{name}", 64)
        assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.num_features)


@pytest.mark.parametrize("fault", [TypeError("odd"), KeyError("x"), ZeroDivisionError()])
def test_whatever_timm_raises_is_one_line(monkeypatch, fault):
    def refuse(*_, **__):
        raise fault

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(UserError, match=r"MODEL\.ENCODER timm/resnet18: timm refuses it \("):
        create_encoder("timm/resnet18")


def test_patches_that_a_backbone_does_not_give():
    encoder = nn.Conv2d(3, 8, 32, 32)
    with pytest.raises(UserError, match="Conv2d has no features of patches of 16 pixels"):
        patch_features(encoder, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "efficientnet_b0"])
def test_a_checkpoint_of_one_loads_whole(tmp_path, name):
    first, second = (create_encoder(f"timm/{name}") for _ in "ab")
    state = {f"encoder.{key}": value for key, value in first.state_dict().items()}
    torch.save({"model": state | {"queue1": torch.zeros(2)}}, tmp_path / "c.pth")
    said = load_encoder_weights(second, str(tmp_path / "c.pth"))
    assert f"{len(state)} of {len(state)} loaded, 1 of other parts left out" in said
    assert all(v.equal(second.state_dict()[k]) for k, v in first.state_dict().items())
    torch.save(first.state_dict() | {"fc.weight": torch.zeros(2)}, tmp_path / "t.pth")
    assert "timm" in load_encoder_weights(second, str(tmp_path / "t.pth"))


def train(_, folder: str, encoder: str) -> None:
    """Two updates with each method; the losses and the BatchNorm statistics of the last model."""
    found = {}
    for method in METHODS:
        opts = ["MODEL.ENCODER", encoder, "DATA.IMG_SIZE", "64", "MODEL.WARMUP_EPOCHS", "0"]
        opts += ["MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"]
        config = load_config(str(ROOT / f"configs/{method}_vit_tiny.yaml"), opts)
        torch.manual_seed(0)
        model = synchronize_batch_norm(build_method(config), CPU)
        optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR)
        parallel = data_parallel(model, CPU)
        torch.manual_seed(rank())
        losses = []
        for _ in range(2):
            model.update_key_encoder(0.9)
            output = parallel(*torch.randn(2, 2, 3, 64, 64), 1)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.enqueue(*output.keys, torch.tensor(True))
            losses.append(output.loss.item())
        state = {k: v for k, v in model.state_dict().items() if "encoder" in k}
        found[method] = losses, model.views_apart, state
    torch.save(found, f"{folder}/{rank()}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_pre_training_in_two_processes(tmp_path, name):
    spawn(train, 2, str(tmp_path), f"timm/{name}")
    states = [torch.load(tmp_path / f"{r}.pth") for r in (0, 1)]
    for method in METHODS:
        (losses, apart, first), (others, _, second) = (state[method] for state in states)
        assert all(torch.tensor(losses + others).isfinite())
        assert losses != others  # each has its own images
        assert apart == (name == "resnet50")
        assert all(value.equal(second[key]) for key, value in first.items())
        statistics = {k: v for k, v in first.items() if k.endswith("running_mean")}
        assert len(statistics) == (2 * 53 if name == "resnet50" else 0)
        assert all(v.any() for v in statistics.values())


def normalise_parts(_, folder: str) -> None:
    layers, images = torch.load(f"{folder}/in.pth", weights_only=False)
    layers = synchronize_batch_norm(layers, CPU)
    own = images.chunk(2)[rank()].requires_grad_()
    output = layers(own)
    (output * torch.arange(1.0, 5.0).view(4, 1, 1)).square().sum().backward()
    for parameter in layers.parameters():
        dist.all_reduce(parameter.grad)
    gradients = [own.grad, *[p.grad for p in layers.parameters()]]
    torch.save((output, gradients, layers.state_dict()), f"{folder}/out{rank()}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm_of_images_in_two_processes_is_that_of_one(tmp_path, kind):
    """Outputs, gradients and statistics, against torch's own; with timm's activation too."""
    torch.manual_seed(0)
    layers = nn.Sequential(kind(4))
    with torch.no_grad():
        layers[0].weight.uniform_(0.5, 2)
        layers[0].bias.uniform_(-1, 1)
    images = 5 + 3 * torch.randn(6, 4, 5, 7)
    torch.save((layers, images), tmp_path / "in.pth")
    spawn(normalise_parts, 2, str(tmp_path))
    images.requires_grad_()
    expected = layers(images)
    (expected * torch.arange(1.0, 5.0).view(4, 1, 1)).square().sum().backward()
    parts = [torch.load(tmp_path / f"out{r}.pth") for r in (0, 1)]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), expected, **close)
    torch.testing.assert_close(torch.cat([p[1][0] for p in parts]), images.grad, **close)
    for _, gradients, state in parts:
        torch.testing.assert_close(gradients[1:], [p.grad for p in layers.parameters()], **close)
        torch.testing.assert_close(dict(state), dict(layers.state_dict()), **close)
