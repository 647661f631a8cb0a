"""DATA.BACKEND device: the opencv views, with the colours changed for a whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny
from PIL import Image

import main_pretrain
from data import opencv
from data.augmentation import ViewParameters, apply_view, draw_view, geometry, view_augmentations
from data.device_views import finish, pack
from data.loader import build_pretraining_loader, normalize

PLAIN = ViewParameters((0, 0, 160, 120), False, (), False, 0.0, False)
# what is drawn, and the largest difference from opencv's view at any pixel, of 255
OPERATIONS = {
    "nothing": (PLAIN, 0),
    "brightness down": (replace(PLAIN, jitter=(("brightness", 0.6),)), 1),
    "brightness up": (replace(PLAIN, jitter=(("brightness", 1.4),)), 1),
    "contrast down": (replace(PLAIN, jitter=(("contrast", 0.6),)), 2),
    "contrast up": (replace(PLAIN, jitter=(("contrast", 1.4),)), 2),
    "saturation down": (replace(PLAIN, jitter=(("saturation", 0.6),)), 1),
    "saturation up": (replace(PLAIN, jitter=(("saturation", 1.4),)), 1),
    "hue": (replace(PLAIN, jitter=(("hue", 0.1),)), 10),
    "hue back": (replace(PLAIN, jitter=(("hue", -0.1),)), 10),
    "half a turn": (replace(PLAIN, jitter=(("hue", 0.5),)), 10),
    "grey": (replace(PLAIN, grey=True), 1),
    "little blur": (replace(PLAIN, sigma=0.3), 1),
    "much blur": (replace(PLAIN, sigma=2.0), 1),
    "solarise": (replace(PLAIN, solarize=True), 0),
    "solarise more": (replace(PLAIN, solarize=True, solarize_from=60), 0),
    "flip": (replace(PLAIN, flip=True), 0),
}
SIZE = 96


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """An image with the detail of a photograph, 120 x 160 x 3."""
    rng = np.random.default_rng(0)
    image = np.zeros((120, 160, 3))
    for side in (2, 4, 9, 25, 60):
        layer = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
        image += np.asarray(layer.resize((160, 120), Image.Resampling.BICUBIC)) / side**0.5
    return np.clip((image - image.mean()) * (60 / image.std()) + 118, 0, 255).astype(np.uint8)


def on_device(image: np.ndarray, views: list[ViewParameters], most_sigma: float, size: int = SIZE):
    """The views of one image as one batch, in values of 0 to 255."""
    cropped = [opencv.apply_view(image, geometry(view), size) for view in views]
    batch = torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2)
    made = finish(batch, torch.stack([pack(view, most_sigma) for view in views]))
    back = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * made
    return 255 * (back + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))


def differences(image: np.ndarray, views: list[ViewParameters], most_sigma: float = 2.0):
    """Of each view, in absolute value, (B, 3, S, S)."""
    expected = np.stack([opencv.apply_view(image, view, SIZE) for view in views])
    made = on_device(image, views, most_sigma)
    return (made - torch.from_numpy(expected).permute(0, 3, 1, 2)).abs()


def test_each_operation_is_that_of_opencv(photograph):
    """In one batch, so that no view's draws reach another."""
    views = [view for view, _ in OPERATIONS.values()]
    found = differences(photograph, views)
    for (name, (_, largest)), difference in zip(OPERATIONS.items(), found, strict=True):
        assert difference.mean() < 2, name
        assert difference.max() <= largest + 0.51, (name, difference.max())


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("sigma", [2.0, 14.0, 60.0])
def test_a_blur_may_be_wider_than_the_view(photograph, size, sigma):
    """As OpenCV's, which reflects the reflections."""
    view = replace(PLAIN, sigma=sigma)
    (made,) = on_device(photograph, [view], sigma, size).permute(0, 2, 3, 1).numpy()
    expected = opencv.apply_view(photograph, view, size)
    assert np.abs(made - expected).max() <= 1
    assert apply_view(Image.fromarray(photograph), view, size).shape == expected.shape


def test_drawn_views_are_those_of_opencv(photograph):
    for kind in view_augmentations("byol", 0.08):
        rng = np.random.default_rng(1)
        views = [draw_view(rng, 160, 120, kind) for _ in range(60)]
        # an inverted value at the threshold of solarisation is far from its neighbour
        plain = [replace(view, solarize=False) for view in views]
        assert differences(photograph, plain).mean((1, 2, 3)).max() < 2
        assert differences(photograph, views).mean() < 1


@pytest.mark.parametrize("place", range(4))
def test_the_order_of_the_jitter_is_kept(photograph, place):
    """With the turn of the hue in each place; in another order the picture differs."""
    others = [("brightness", 1.4), ("contrast", 0.6), ("saturation", 1.2)]
    jitter = (*others[:place], ("hue", 0.2), *others[place:])
    view, swapped = (replace(PLAIN, jitter=order) for order in (jitter, jitter[::-1]))
    assert differences(photograph, [view]).mean() < 2
    there, back = on_device(photograph, [view, swapped], 0)
    assert (there - back).abs().mean() > 2


def test_without_a_blur_no_weights_are_sent(photograph):
    assert len(pack(PLAIN, 0)) + 10 == len(pack(PLAIN, 2.0))
    assert differences(photograph, [PLAIN], most_sigma=0).max() < 0.01


def batches(root, backend: str, workers: str = "0"):
    config, _ = tiny(
        "configs/moby_vit_tiny.yaml",
        *("DATA.BATCH_SIZE", "4", "DATA.BACKEND", backend, "DATA.NUM_WORKERS", workers),
    )
    config.DATA.DATA_PATH = str(root)
    return build_pretraining_loader(config)


def test_the_model_gets_nearly_the_views_of_opencv(imagenet):
    seen: list[list[torch.Tensor]] = []
    for backend in ("opencv", "device"):
        for (batch,) in batches(imagenet, backend):

            def model(one, other, epoch):
                return [one, other]

            seen.append(main_pretrain.forward_views(model, torch.device("cpu"), 0, batch))
    half = len(seen) // 2
    scale = 255 * 0.225
    for ours, theirs in zip(seen[:half], seen[half:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape == (4, 3, 32, 32)
            assert (one - other).abs().mean() * scale < 2


def test_undrawn_views_are_normalised_alike():
    views = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    draws = torch.stack([pack(PLAIN, 2.0)] * 3)
    torch.testing.assert_close(finish(views, draws), normalize(views))


@pytest.mark.slow
def test_a_run_trains_and_replaces_bad_images(imagenet, tmp_path, run_main):
    run_main(
        main_pretrain,
        *("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet),
        *("--output", tmp_path, "--opts", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4"),
        *("MODEL.ENCODER", "vit_nano", "MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"),
        *("TRAIN.EPOCHS", "2", "MODEL.WARMUP_EPOCHS", "1", "DATA.BACKEND", "device"),
        *("MODEL.NAME", "run", "TRAIN.WARMUP_EPOCHS", "1", "DATA.NUM_WORKERS", "1"),
    )
    state = torch.load(tmp_path / "run/default/checkpoint.pth", weights_only=True)
    assert state["step"] == 12
