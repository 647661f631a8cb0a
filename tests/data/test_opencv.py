"""The fast path of the views against torchvision's operations, on photographs."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as TF

from data import augmentation, opencv
from data.augmentation import draw_view, view_augmentations
from utils.errors import UserError

PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]
SMALL = [p.resize((224, 224), Image.Resampling.BILINEAR) for p in PHOTOGRAPHS]
TOLERANCE = 2.0  # of 255, in the mean over the pixels


def difference(one, other) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize(
    ("fast", "torchvisions", "amounts"),
    [
        (opencv.brightness, TF.adjust_brightness, (0.6, 0.9, 1.4)),
        (opencv.contrast, TF.adjust_contrast, (0.6, 0.9, 1.4)),
        (opencv.saturation, TF.adjust_saturation, (0.6, 0.9, 1.4)),
        (opencv.hue, TF.adjust_hue, (-0.1, -0.03, 0.0, 0.05, 0.1)),
        (opencv.blur, lambda i, s: i.filter(ImageFilter.GaussianBlur(s)), (0.1, 0.5, 1.0, 2.0)),
    ],
)
def test_operations_stay_near_torchvisions(fast, torchvisions, amounts):
    for image in SMALL:
        for amount in amounts:
            expected = torchvisions(image, amount)
            assert difference(fast(np.asarray(image), amount), expected) < TOLERANCE, amount


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (100, 20, 300, 400), (30, 20, 90, 70)])
@pytest.mark.parametrize("size", [32, 224])
def test_crops_stay_near_torchvisions(box, size):
    left, top, width, height = box
    for image in PHOTOGRAPHS:
        expected = TF.resized_crop(image, top, left, height, width, [size, size])
        fast = opencv.resized_crop(np.array(image), box, size)
        assert difference(fast, expected) < 0.5


def test_whole_views_stay_near_those_of_pil():
    differences = []
    for number, kind in enumerate(view_augmentations("byol", 0.08)):
        for i in range(40):
            rng = np.random.default_rng((number, i))
            image = PHOTOGRAPHS[i % 2]
            view = draw_view(rng, *image.size, kind)
            plain = augmentation.apply_view(image, view, 96)
            fast = opencv.apply_view(np.array(image), view, 96)
            assert fast.shape == (96, 96, 3) and fast.dtype == np.uint8
            # an inverted value at the threshold of solarisation is far from its neighbour
            if not view.solarize:
                differences.append(difference(fast, plain))
    assert max(differences) < 2 * TOLERANCE
    assert np.mean(differences) < 0.5 * TOLERANCE


def test_solarisation_and_grey_are_exact():
    image = SMALL[0]
    assert difference(np.take(opencv.SOLARIZE, np.asarray(image)), TF.solarize(image, 128)) == 0


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_pil_does(mode):
    content = encoded(SMALL[1].convert(mode), "JPEG", quality=92)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert difference(opencv.decode_array(content, "x"), expected) < 0.5


def test_orientation_is_left_alone_as_by_pil():
    tags = Image.Exif()
    tags[0x0112] = 6
    content = encoded(PHOTOGRAPHS[0], "JPEG", exif=tags)
    assert opencv.decode_array(content, "x").shape == (427, 640, 3)


def test_other_formats_are_left_to_pil():
    clear = Image.fromarray(np.zeros((4, 4, 4), np.uint8))
    assert opencv.decode_array(encoded(clear, "PNG"), "x").min() == 255


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_jpegs_are_named(keep):
    content = encoded(PHOTOGRAPHS[0], "JPEG")
    with pytest.raises(UserError, match=r"photo\.jpg: not a readable image"):
        opencv.decode_array(content[: int(keep * len(content))], "photo.jpg")
