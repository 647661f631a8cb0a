"""Patch features of stride 16, or a ViT's own, at any size; class tokens of the last blocks."""

import numpy as np
import pytest
import torch

from data.davis import fit_frame
from models.encoder import create_encoder
from models.patch_features import ClassTokens, has_class_token, patch_features, patch_stride


@pytest.mark.parametrize("patch", [7, 8, 14, 16])
def test_a_grid_of_patches_covers_a_fitted_frame(patch):
    """So that a mask of as many cells lies on it; frames of other patches stay as published."""
    encoder = create_encoder("vit_nano", 32, patch_size=patch)
    assert patch_stride(encoder) == patch
    for shape in ((480, 854), (480, 910), (600, 480), (130, 97)):
        frame = np.zeros((*shape, 3), np.uint8)
        fitted = fit_frame(frame, 96, patch)
        if 64 % patch == 0:
            assert fitted.shape == fit_frame(frame, 96).shape
        images = torch.zeros(1, 3, *fitted.shape[:2])
        grid = patch_features(encoder, images).shape[1:3]
        assert (grid[0] * patch, grid[1] * patch) == fitted.shape[:2]


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


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("name", ["vit_nano", "timm/deit_tiny_distilled_patch16_224"])
def test_class_tokens_of_the_last_blocks(name, patches):
    """Each after the last LayerNorm, also where a token of distillation follows."""
    encoder = create_encoder(name, 32).eval()
    images, outputs = torch.rand(2, 3, 32, 32), []
    for block in encoder.blocks[-3:]:
        block.register_forward_hook(lambda *given: outputs.append(encoder.norm(given[2])))
    encoder.forward_features(images)
    expected = [tokens[:, 0] for tokens in outputs]
    if patches:
        expected.append(outputs[2][:, encoder.num_prefix_tokens :].mean(1))
    tokens = ClassTokens(3, patches)
    tokens.check(encoder)
    found = tokens(encoder, images)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert found.shape[1] == tokens.width(encoder)


def test_what_has_a_class_token():
    names = {"vit_nano": True, "swin_tiny": False, "timm/vit_pwee_patch16_reg1_gap_256": False}
    assert {name: has_class_token(create_encoder(name, 32)) for name in names} == names
