"""Images of any size as DINO takes them."""

import math

import pytest
import torch
from torch.nn import functional as F

from evaluation.retrieval_features import AsDino
from models.encoder import create_encoder


def dinos_feature(vit, images):
    """vision_transformer.py of DINO, written out for the weights of a ViT of timm."""
    patch, (_, _, w, h) = vit.patch_embed.patch_size[0], images.shape
    x = F.conv2d(images, *vit.patch_embed.proj.parameters(), stride=patch).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1)
    positions, n = vit.pos_embed, vit.pos_embed.shape[1] - 1
    if not (x.shape[1] - 1 == n and w == h):
        w0, h0 = w // patch + 0.1, h // patch + 0.1
        side = int(math.sqrt(n))
        own = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = (w0 / math.sqrt(n), h0 / math.sqrt(n))
        own = F.interpolate(own, scale_factor=scale, mode="bicubic")
        assert int(w0) == own.shape[-2] and int(h0) == own.shape[-1]
        own = own.permute(0, 2, 3, 1).reshape(1, -1, x.shape[-1])
        positions = torch.cat([positions[:, :1], own], 1)
    x = x + positions
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[:, 0]


def with_learned_positions(name):
    torch.manual_seed(0)
    vit = create_encoder(name, img_size=64).eval()
    weights = vit.state_dict()
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    vit.load_state_dict(weights)
    return vit


@pytest.mark.parametrize("size", [(64, 64), (64, 71), (71, 64), (75, 99), (224, 149), (33, 17)])
@pytest.mark.parametrize("name", ["vit_nano", "timm/test_vit"])
@torch.no_grad()
def test_features_are_those_of_dino(name, size):
    vit, images = with_learned_positions(name), torch.randn(2, 3, *size)
    expected = dinos_feature(vit, images)
    torch.testing.assert_close(AsDino(vit)(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_encoders_stay_as_they_are():
    """And fixed positions are those of the grid that is left."""
    images = torch.randn(1, 3, 70, 85)
    swin = create_encoder("timm/test_resnet").eval()
    assert AsDino(swin)(images).equal(swin(images))
    vit = create_encoder("vit_nano", img_size=32).eval()
    assert AsDino(vit)(images).equal(vit(images[:, :, :64, :80]))
    tiny = images[:, :, :3, :20]  # a side shorter than a patch is padded
    assert AsDino(vit)(tiny).equal(vit(tiny[:, :, :, :16]))
