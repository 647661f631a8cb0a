"""Patch features have stride 16, or a ViT's own, at any size, and are those of the last block."""

import pytest
import torch

from models.encoder import create_encoder
from models.patch_features import patch_features


@pytest.mark.parametrize("name, stride, width", [("vit_nano", 8, 128), ("swin_tiny", 16, 384)])
@pytest.mark.parametrize("height, size", [(32, 64), (96, 48)])
def test_grid(name, stride, width, height, size):
    encoder = create_encoder(name, 32).eval()
    features = patch_features(encoder, torch.zeros(2, 3, height, size))
    assert features.shape == (2, height // stride, size // stride, width)


def test_a_vit_gives_its_normalised_last_tokens():
    encoder = create_encoder("vit_nano", 32).eval()
    images = torch.rand(2, 3, 32, 48)
    tokens = encoder.forward_features(images)  # Bx(1+hw)xC
    assert torch.equal(patch_features(encoder, images).flatten(1, 2), tokens[:, 1:])


def test_a_swin_gives_the_third_stage():
    encoder = create_encoder("swin_tiny", 32).eval()
    images = torch.rand(1, 3, 32, 64)
    expected = encoder.patch_embed(images)
    for stage in encoder.layers[:3]:
        expected = stage(expected)
    assert torch.equal(patch_features(encoder, images), expected)
