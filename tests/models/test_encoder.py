"""Backbones against the published ones, at any size, and through their options."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import reference
from torch import nn

from models.encoder import ENCODERS, RESNETS, choose_attention, create_encoder, create_timm_backbone
from models.swin import SwinTransformer
from models.vit import VisionTransformer, fixed_positions
from utils.errors import UserError
from utils.update import Precision

PUBLISHED = ["vit_small", "vit_base", "swin_tiny", "swin_small", "swin_base"]
SMALL = ["vit_nano", "vit_tiny", "swin_tiny"]


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of the formula beside the reference features, under the published names."""
    shapes = reference("state_dict.json")[name]["parameters"]
    weights = {}
    for j, key in enumerate(sorted(shapes)):
        if key == "pos_embed":
            weights[key] = torch.from_numpy(reference("backbones.npz")["vit_small_pos_embed"])
            continue
        count = int(np.prod(shapes[key]))
        values = 0.04 * np.sin(0.37 * np.arange(count) + j)
        weights[key] = torch.from_numpy(values.astype(np.float32)).view(shapes[key])
        if key.endswith("weight") and len(shapes[key]) == 1:
            weights[key] += 1
    return weights


@pytest.mark.parametrize("name", ["vit_small", "swin_tiny"])
def test_features_equal_the_published_ones(name):
    encoder = create_encoder(name).eval()
    encoder.load_state_dict(published_weights(name))
    image = torch.sin(0.01 * torch.arange(2 * 3 * 224 * 224, dtype=torch.float64))
    with torch.no_grad():
        features = encoder(image.float().view(2, 3, 224, 224))
    torch.testing.assert_close(
        features, torch.from_numpy(reference("backbones.npz")[name]), rtol=1e-4, atol=1e-5
    )


def test_positions_equal_the_published_ones():
    expected = torch.from_numpy(reference("backbones.npz")["vit_small_pos_embed"])
    torch.testing.assert_close(create_encoder("vit_small").pos_embed.data, expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    published = reference("state_dict.json")[name]
    with torch.device("meta"):
        encoder = create_encoder(name) if name.startswith("swin") else None
    encoder = encoder or create_encoder(name)
    assert encoder.num_features == published["num_features"]
    shapes = {k: list(v.shape) for k, v in encoder.named_parameters()}
    if name.startswith("vit"):
        assert shapes == published["parameters"]
        frozen = [k for k, v in encoder.named_parameters() if not v.requires_grad]
        assert frozen == published["frozen"]
    else:
        moved = {  # timm puts the downsampling at the start of the next stage
            k.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample"): v
            for k, v in shapes.items()
            for i in [int(k.split(".")[1]) if k.startswith("layers") else 0]
        }
        assert moved == published["parameters"]


def test_published_buffers_are_no_hindrance():
    published = reference("state_dict.json")["swin_tiny"]
    weights = {k: torch.ones(v) for k, v in published["parameters"].items()}
    buffers = {k: torch.ones(v) for k, v in published["buffers"].items()}
    encoder = create_encoder("swin_tiny")
    encoder.load_state_dict(weights | buffers)
    assert all(bool((p == 1).all()) for p in encoder.parameters())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 64)])
def test_any_image_size(name, size):
    encoder = create_encoder(name, img_size=64).eval()
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, *size))
    assert features.shape == (2, encoder.num_features)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_serves_every_size(name):
    torch.manual_seed(0)
    first = create_encoder(name, img_size=64).eval()
    second = create_encoder(name, img_size=32).eval()
    second.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(second(image), first(image))


def test_learned_positions_are_interpolated():
    encoder = create_encoder("vit_nano", img_size=32).eval()
    state = encoder.state_dict() | {"pos_embed": torch.randn(1, 37, 128)}  # a grid of 6 x 6
    encoder.load_state_dict(state)
    assert not encoder.fixed_positions
    assert encoder.pos_embed.shape == (1, 17, 128)
    assert encoder.pos_embed.abs().max() > 1.5  # sines and cosines are not


def test_positions_of_an_oblong_grid_follow_rows_and_columns():
    square, oblong = (fixed_positions(grid, 32)[0, 1:] for grid in ((4, 4), (2, 4)))
    torch.testing.assert_close(oblong, square[:8])  # the first two of four rows


def test_initialisation_is_moco_v3s():
    torch.manual_seed(0)
    encoder = create_encoder("vit_small")
    block = encoder.blocks[3]
    for weight, limit in (
        (block.attn.qkv.weight, np.sqrt(6 / (384 + 384))),  # q, k and v each by itself
        (block.mlp.fc1.weight, np.sqrt(6 / (384 + 1536))),
        (encoder.patch_embed.proj.weight, np.sqrt(6 / (3 * 16 * 16 + 384))),
    ):
        assert 0.98 * limit < weight.abs().max() <= limit
    assert block.attn.qkv.bias.abs().max() == 0 == encoder.patch_embed.proj.bias.abs().max()
    assert 0 < encoder.cls_token.abs().max() < 1e-5
    assert encoder.blocks[0].norm1.eps == 1e-6


def test_the_smallest_vit_has_about_a_million_parameters():
    assert 0.9e6 < sum(p.numel() for p in create_encoder("vit_nano", 64).parameters()) < 1.1e6


def test_frozen_patch_projection():
    encoder = create_encoder("vit_nano", img_size=32, stop_grad_conv1=True)
    encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in encoder.patch_embed.parameters())
    assert encoder.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_batch_norm_before_the_mlp(name):
    encoder = create_encoder(name, img_size=32, replace_ln_with_bn=True)
    blocks = [m for m in encoder.modules() if hasattr(m, "norm2") and hasattr(m, "mlp")]
    depth = {"vit_nano": 5, "swin_tiny": 12}[name]
    assert len(blocks) == depth
    assert all(isinstance(b.norm2, torch.nn.BatchNorm1d) for b in blocks)
    encoder(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(b.norm2.weight.grad is not None and b.norm2.running_mean.any() for b in blocks)


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        encoder = create_encoder(
            name, img_size=32, drop_path_rate=0.3, use_checkpoint=use_checkpoint
        )
        torch.manual_seed(1)
        encoder(torch.randn(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"'vit_smal' is unknown, .*, did you mean vit_small"):
        create_encoder("vit_smal")
    with pytest.raises(UserError, match=r"resnet9.* is unknown, choose from"):
        create_encoder("resnet9")
    with pytest.raises(UserError, match="STOP_GRAD_CONV1: timm/resnet50 has no patch projection"):
        create_encoder("resnet50", stop_grad_conv1=True)


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_a_frozen_projection_is_all_that_is_frozen(name):
    """As published, also of a Swin: the LayerNorm behind it learns."""
    with torch.device("meta"):
        plain, frozen = (create_encoder(name, 32, stop_grad_conv1=stop) for stop in (False, True))
    learn = [{n for n, p in e.named_parameters() if p.requires_grad} for e in (plain, frozen)]
    assert learn[0] - learn[1] == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_have_their_published_names(name):
    with torch.device("meta"):
        one, other = create_encoder(name), create_encoder(f"timm/{name}")
    shapes = [{k: v.shape for k, v in e.state_dict().items()} for e in (one, other)]
    assert shapes[0] == shapes[1] and one.num_features == 2048


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
@pytest.mark.parametrize("level", ["O0", "O1"])
def test_the_chosen_attention_computes_the_same(name, level):
    torch.manual_seed(0)
    plain = create_encoder(name, 32)
    chosen = copy.deepcopy(plain)
    precision = Precision(level, CPU)
    choose_attention(chosen, precision)
    images = torch.randn(2, 3, 32, 32)
    direction = torch.randn(plain.num_features)
    results = []
    for encoder in (plain, chosen):
        with precision.autocast():
            features = encoder(images).float()
        (features @ direction).sum().backward()
        results.append([features, *(p.grad for p in encoder.parameters() if p.requires_grad)])
    for actual, wanted in zip(*results, strict=True):
        difference = (actual - wanted).norm()
        assert difference <= (1e-4 if level == "O0" else 0.1) * wanted.norm() + 1e-5


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_fused_attention_of_a_key_encoder_is_as_exact(name):
    """In bfloat16, against float32: no further off than the plain form."""
    torch.manual_seed(0)
    encoder = create_encoder(name, 32).requires_grad_(False).eval()
    images = torch.randn(8, 3, 32, 32)
    wanted = encoder(images)
    errors = {}
    for fused in (False, True):
        for layer in encoder.modules():
            if hasattr(layer, "fused_attn"):
                layer.fused_attn = fused
        with Precision("bfloat16", CPU).autocast():
            errors[fused] = (encoder(images).float() - wanted).norm() / wanted.norm()
    assert errors[True] < 1.2 * errors[False] and errors[True] < 0.02


def test_attention_is_fused_where_that_is_faster():
    def fused(encoder: torch.nn.Module, level: str) -> set[bool]:
        choose_attention(encoder, Precision(level, CPU))
        return {m.fused_attn for m in encoder.modules() if hasattr(m, "fused_attn")}

    for name in ("vit_nano", "swin_tiny"):
        assert fused(create_encoder(name, 32), "O1") == {False}
        for level in ("O0", "O1"):  # a key encoder has no backward pass
            assert fused(create_encoder(name, 32).requires_grad_(False), level) == {True}
    assert fused(create_encoder("vit_nano", 32), "O0") == {True}
    assert fused(create_encoder("swin_tiny", 32), "O0") == {False}


# width, blocks (a stage), heads (a stage), of the papers and of the published code
VITS = {
    "vit_nano": (128, 5, 4, 8),
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 12, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
    "vit_huge": (1280, 32, 16, 14),
}
SWINS = {
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


@pytest.mark.parametrize("name", sorted(VITS))
def test_vits_have_the_papers_sizes(name):
    width, depth, heads, patch = VITS[name]
    with torch.device("meta"):
        encoder = create_encoder(name)
    assert encoder.num_features == width and len(encoder.blocks) == depth
    assert {b.attn.num_heads for b in encoder.blocks} == {heads}
    assert encoder.patch_embed.proj.kernel_size == (patch, patch)
    assert encoder.patch_embed.grid_size == (224 // patch, 224 // patch)


@pytest.mark.parametrize("name", sorted(SWINS))
def test_swins_have_the_papers_sizes(name):
    width, depths, heads = SWINS[name]
    with torch.device("meta"):
        encoder = create_encoder(name)
    assert encoder.num_features == 8 * width
    assert tuple(len(stage.blocks) for stage in encoder.layers) == depths
    assert tuple(stage.blocks[0].attn.num_heads for stage in encoder.layers) == heads
    assert encoder.patch_embed.grid_size == (56, 56)


def test_all_encoders_are_in_a_table():
    assert set(ENCODERS) == set(VITS) | set(SWINS)


@pytest.mark.parametrize("size", [32, 96, 224, 256])
def test_windows_of_a_swin_stay_7_wide(size):
    """So that one checkpoint serves every size; the last stage of 224 pixels is 7 wide itself."""
    for stage in create_encoder("swin_tiny", size).layers:
        for block in stage.blocks:
            assert tuple(block.attn.window_size) == (7, 7)
            assert block.attn.relative_position_bias_table.shape[0] == 13 * 13


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_an_encoder_has_no_regularisation_unless_asked(name):
    def rates(**options) -> set[float]:
        encoder = create_encoder(name, 32, **options)
        dropouts = {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)}
        paths = {m.drop_prob for m in encoder.modules() if hasattr(m, "drop_prob")}
        return dropouts | paths

    assert rates() <= {0.0}
    assert 0.25 in rates(drop_rate=0.25)
    assert max(rates(drop_path_rate=0.3)) == pytest.approx(0.3)
    kind = type(create_encoder(name, 32))
    for plain in (kind(32), kind()):  # by its own defaults
        dropouts = [m for m in plain.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and not any(m.p for m in dropouts)
        assert not any(getattr(m, "drop_prob", 0) for m in plain.modules())
    encoder = create_encoder(name, 32)
    assert not any(getattr(m, "grad_checkpointing", False) for m in encoder.modules())
    assert any(p.requires_grad for p in encoder.patch_embed.parameters())
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in encoder.modules())


def test_a_vit_is_drawn_as_moco_v3_says():
    torch.manual_seed(0)
    encoder = VisionTransformer(patch_size=8, embed_dim=64, depth=1, num_heads=2, img_size=32)
    weight = encoder.patch_embed.proj.weight.detach()
    limit = (6 / (3 * 64 + 64)) ** 0.5  # fan-in 3 x 8 x 8, fan-out the width
    assert 0.97 * limit < float(weight.abs().max()) <= limit
    assert float(weight.std()) == pytest.approx(limit / 3**0.5, rel=0.03)
    assert not encoder.patch_embed.proj.bias.any()
    assert 1e-7 < float(encoder.cls_token.detach().std()) < 3e-6
    assert encoder.no_weight_decay() == {"pos_embed", "cls_token"}
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("positions", [None, (1, 17), (1, 17, 8), (1, 16, 128), (17, 128)])
def test_positions_that_do_not_fit_are_refused_not_guessed(positions):
    """None in the file, no dimension too few, another width, no square."""
    encoder = create_encoder("vit_nano", 32)
    state = dict(encoder.state_dict())
    if positions is None:
        del state["pos_embed"]
    else:
        state["pos_embed"] = torch.randn(positions)
    with pytest.raises(RuntimeError, match="pos_embed"):
        encoder.load_state_dict(state)


def test_what_a_wrapper_holds_is_fitted_below_its_prefix():
    small, large = create_encoder("vit_nano", 32), create_encoder("vit_nano", 64)
    wrapper = torch.nn.ModuleDict({"encoder": large})
    wrapper.load_state_dict({f"encoder.{k}": v for k, v in small.state_dict().items()})
    assert large.fixed_positions and large.pos_embed.shape == (1, 65, 128)
    torch.testing.assert_close(large.pos_embed, create_encoder("vit_nano", 64).pos_embed)


def test_networks_are_built_as_published_unless_told_otherwise():
    """Swin-T at 224 pixels, and a ViT-S of 16-pixel patches, without dropout."""
    swin, named = SwinTransformer(), create_encoder("swin_tiny")
    assert {k: v.shape for k, v in swin.state_dict().items()} == {
        k: v.shape for k, v in named.state_dict().items()
    }
    assert [s.blocks[0].attn.num_heads for s in swin.layers] == [3, 6, 12, 24]
    vit, named = VisionTransformer(), create_encoder("vit_small")
    assert {k: v.shape for k, v in vit.state_dict().items()} == {
        k: v.shape for k, v in named.state_dict().items()
    }
    for encoder in (swin, vit):
        assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
        assert not any(getattr(m, "drop_prob", 0.0) for m in encoder.modules())
        assert encoder.patch_embed.img_size == (224, 224)


TWO_STAGES = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}


def swin(size):
    return SwinTransformer(size, **TWO_STAGES)


def of_timm(name, size, **options):
    return create_timm_backbone(name, img_size=size, **options)[0]


@pytest.mark.parametrize(
    ("create", "sizes"),
    [
        (swin, (32, 48, 56, 64, 96)),
        (partial(of_timm, "swin_tiny_patch4_window7_224", **TWO_STAGES), (56, 64, 96)),
        (partial(of_timm, "swinv2_tiny_window8_256", **TWO_STAGES), (64, 72, 96)),
        (partial(create_encoder, "vit_nano"), (32, 56, 64)),
        (partial(of_timm, "convnext_atto"), (32, 64)),
    ],
)
@pytest.mark.parametrize("image", [(56, 56), (64, 56), (64, 72)])
@torch.no_grad()
def test_a_feature_does_not_depend_on_the_size_of_construction(create, sizes, image):
    """Whatever DATA.IMG_SIZE is: the same weights and the same image give the same feature."""
    torch.manual_seed(0)
    weights = {name: nn.init.normal_(p) for name, p in create(sizes[-1]).named_parameters()}
    weights.pop("pos_embed", None)  # of a grid
    images, features = torch.randn(2, 3, *image), []
    for size in sizes:
        encoder = create(size).eval()
        encoder.load_state_dict(weights, strict=False)
        encoder(torch.zeros(1, 3, 128, 128))  # what it saw before does not matter either
        features.append(encoder(images))
    for other in features[1:]:
        torch.testing.assert_close(other, features[0])
