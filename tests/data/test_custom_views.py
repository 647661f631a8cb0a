"""AUG.SSL_AUG_TYPE custom: keys for each view, of which byol and simclr are presets."""

import numpy as np
import pytest
from helpers import ROOT, tiny
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from data import augmentation, opencv
from data.augmentation import configured_views, draw_view, view_augmentations
from data.loader import build_pretraining_loader
from utils.config import load_config
from utils.errors import UserError

SIMCLR = []
for view in ("AUG.VIEW1", "AUG.VIEW2"):
    SIMCLR += [f"{view}.CROP", "[0.2, 1.0]", f"{view}.SATURATION", "0.4", f"{view}.BLUR", "0.5"]
    SIMCLR += [f"{view}.SOLARIZE", "0.0"]


def views(*opts):
    opts = ["AUG.SSL_AUG_TYPE", "custom", *opts]
    return configured_views(load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts).AUG)


@pytest.mark.parametrize(("preset", "opts"), [("byol", []), ("simclr", SIMCLR)])
def test_presets_are_values_of_the_same_keys(preset, opts):
    for own, published in zip(views(*opts), view_augmentations(preset, 0.08), strict=True):
        assert own.ratio == pytest.approx(published.ratio, abs=1e-4)
        fields = [name for name in vars(own) if name != "ratio"]
        assert [getattr(own, f) for f in fields] == [getattr(published, f) for f in fields]


def test_each_key_reaches_its_view():
    opts = {
        "CROP": ("[0.3, 0.5]", "crop", (0.3, 0.5)),
        "RATIO": ("[1.0, 2.0]", "ratio", (1.0, 2.0)),
        "FLIP": ("0.1", "flip_prob", 0.1),
        "JITTER": ("0.2", "jitter_prob", 0.2),
        "BRIGHTNESS": ("0.3", "brightness", 0.3),
        "CONTRAST": ("0.5", "contrast", 0.5),
        "SATURATION": ("0.6", "saturation", 0.6),
        "HUE": ("0.5", "hue", 0.5),
        "GREY": ("0.7", "grey_prob", 0.7),
        "BLUR": ("0.9", "blur_prob", 0.9),
        "BLUR_SIGMA": ("[1.0, 3.0]", "sigma", (1.0, 3.0)),
        "SOLARIZE": ("0.15", "solarize_prob", 0.15),
        "SOLARIZE_FROM": ("200", "solarize_from", 200),
        "INTERPOLATION": ("bicubic", "interpolation", "bicubic"),
    }
    assert len(opts) == len(vars(views()[0]))
    plain = views()
    for number in (0, 1):
        for key, (text, field, value) in opts.items():
            found = views(f"AUG.VIEW{number + 1}.{key}", text)
            assert getattr(found[number], field) == value
            assert found[1 - number] == plain[1 - number]


def test_draws_follow_the_keys():
    custom, _ = views(
        *("AUG.VIEW1.RATIO", "[1.0, 1.0]", "AUG.VIEW1.CROP", "[0.25, 0.25]"),
        *("AUG.VIEW1.FLIP", "0.9", "AUG.VIEW1.BRIGHTNESS", "1.5", "AUG.VIEW1.SOLARIZE", "1.0"),
        *("AUG.VIEW1.SOLARIZE_FROM", "10"),
    )
    rng = np.random.default_rng(0)
    drawn = [draw_view(rng, 100, 100, custom) for _ in range(500)]
    assert {view.box[2:] for view in drawn} == {(50, 50)}
    assert np.mean([view.flip for view in drawn]) == pytest.approx(0.9, abs=0.05)
    factors = [dict(view.jitter)["brightness"] for view in drawn if view.jitter]
    assert 0 <= min(factors) < 0.1 and max(factors) > 2.3  # of 1 -+ 1.5, cut at 0
    assert all(view.solarize and view.solarize_from == 10 for view in drawn)


@pytest.mark.parametrize("mode", augmentation.INTERPOLATION)
def test_both_back_ends_resize_as_torchvision(mode):
    """Within the crop: at its border torchvision's weights are of the crop alone, PIL's are not."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)
    view = augmentation.ViewParameters((40, 30, 200, 150), False, (), False, 0.0, False, 128, mode)
    expected = TF.resized_crop(image, 30, 40, 150, 200, [48, 48], InterpolationMode(mode))
    for made in (
        augmentation.apply_view(image, view, 48),
        opencv.apply_view(np.array(image), view, 48),
    ):
        inside = (slice(3, -3), slice(3, -3))
        difference = np.abs(made.astype(int) - np.asarray(expected, int))[inside]
        assert difference.max() <= 2


@pytest.mark.parametrize("key", ["CROP", "RATIO", "BLUR_SIGMA"])
def test_a_range_the_wrong_way_round_is_named(imagenet, key):
    config, _ = tiny("configs/moby_vit_tiny.yaml", "DATA.BATCH_SIZE", "4")
    config.DATA.DATA_PATH = str(imagenet)
    config.AUG.SSL_AUG_TYPE = "custom"
    config.AUG.VIEW2[key] = [0.9, 0.5]
    with pytest.raises(UserError, match="must be two numbers, the smaller first"):
        build_pretraining_loader(config)


def test_a_custom_run_gets_other_views(imagenet):
    """Grey always: every pixel of a view has equal channels."""
    opts = ["AUG.SSL_AUG_TYPE", "custom", "AUG.VIEW2.GREY", "1.0", "DATA.NUM_WORKERS", "0"]
    config, _ = tiny("configs/moby_vit_tiny.yaml", "DATA.BATCH_SIZE", "4", *opts)
    config.DATA.DATA_PATH = str(imagenet)
    ((first, second, *_),) = next(iter(build_pretraining_loader(config)))
    assert (second == second[..., :1]).all() and not (first == first[..., :1]).all()
