"""The fast path of the views against torchvision's operations, on photographs."""

import dataclasses
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
    for start in (0, 60, 128, 256):
        found = opencv.solarize(np.asarray(image), start)
        assert difference(found, TF.solarize(image, start)) == 0


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


def header(marker=0xC0, bits=8, height=40, width=60, components=3, before=b"", after=20) -> bytes:
    """The start of a JPEG up to its frame's header, and some bytes behind."""
    frame = (
        bytes([0xFF, marker, 0, 17, bits]) + height.to_bytes(2, "big") + width.to_bytes(2, "big")
    )
    jfif = bytes([0xFF, 0xE0, 0, 16]) + b"JFIF\0".ljust(14, b"\0")
    return b"\xff\xd8" + jfif + before + frame + bytes([components]) + bytes(after)


HUFFMAN = bytes([0xFF, 0xC4, 0, 5, 1, 2, 3])  # the tables of a code, of length 5


@pytest.mark.parametrize(
    ("content", "plain"),
    [
        (header(), True),
        (header(components=1), True),
        (header(components=4), False),  # CMYK
        (header(components=2), False),
        (header(bits=12), False),
        (header(marker=0xC2), True),  # progressive
        (header(marker=0xCF), True),
        (header(marker=0xD0), False),
        (header(before=HUFFMAN), True),
        (header(before=b"\xff\xff\xff"), True),  # padding
        (header(before=b"\0"), False),  # no marker
        (header(height=1, width=100), True),
        (header(height=1, width=101), False),
        (header(height=101, width=1), False),
        (header(height=300, width=30001), False),
        (header(height=0), False),
        (header(height=65535, width=65535), False),
        (header(after=0), True),
        (header(after=0)[:-1], False),  # it ends within
        (b"\xff\xd8", False),
        (b"\xff\xd8" + HUFFMAN, False),
    ],
)
def test_what_opencv_may_decode(content, plain):
    assert bool(opencv.jpeg_size(content)) == plain
    for marker in (0xC4, 0xC8, 0xCC):  # no frame's header, whatever stands there
        assert not opencv.jpeg_size(header(marker=marker, components=3, after=0))


@pytest.mark.parametrize("end", [b"", b"\0", b"\0\0\0"])
def test_a_whole_jpeg_is_opencvs_and_a_part_is_pils(monkeypatch, end):
    content = encoded(SMALL[0], "JPEG", quality=92) + end
    calls = []
    monkeypatch.setattr(opencv, "decode_rgb", lambda *given: calls.append(given) or SMALL[0])
    opencv.decode_array(content, "x")
    assert not calls
    opencv.decode_array(content[: -len(end) - 1], "x")
    opencv.decode_array(encoded(SMALL[0], "PNG"), "y")
    assert [name for _, name in calls] == ["x", "y"]


def test_pil_solarises_from_128():
    pixels = np.array([[[0, 127, 128], [129, 254, 255]]] * 2, np.uint8)
    view = augmentation.ViewParameters((0, 0, 2, 2), False, (), False, 0.0, True)
    expected = np.array([[[0, 127, 127], [126, 1, 0]]] * 2)
    assert np.array_equal(augmentation.apply_view(Image.fromarray(pixels), view, 2), expected)
    assert np.array_equal(opencv.apply_view(pixels, view, 2), expected)


def test_hue_turns_the_whole_circle():
    """A third of a turn makes red green, and two thirds, or one back, make it blue."""
    red = np.full((2, 2, 3), (200, 20, 20), np.uint8)
    for turns, channel in ((1 / 3, 1), (2 / 3, 2), (-1 / 3, 2), (0.0, 0), (1.0, 0)):
        turned = opencv.hue(red.copy(), turns)
        assert turned[0, 0].argmax() == channel and turned[0, 0].max() > 190, turns


def test_a_view_does_what_was_drawn_in_its_order(monkeypatch):
    done = []
    for name in opencv.JITTER:
        monkeypatch.setitem(
            opencv.JITTER,
            name,
            lambda image, amount, name=name: done.append((name, amount)) or image,
        )
    monkeypatch.setattr(opencv, "blur", lambda image, sigma: done.append(("blur", sigma)) or image)
    jitter = (("hue", 0.1), ("contrast", 0.7))
    pixels = np.asarray(SMALL[0])
    view = augmentation.ViewParameters((10, 20, 30, 40), True, jitter, True, 1.5, False)
    made = opencv.apply_view(pixels, view, 32)
    assert done == [("hue", 0.1), ("contrast", 0.7), ("blur", 1.5)]
    assert (made == made[..., :1]).all()  # grey
    plain = augmentation.ViewParameters((10, 20, 30, 40), False, (), False, 0.0, False)
    crop = opencv.resized_crop(pixels, (10, 20, 30, 40), 32)
    assert np.array_equal(opencv.apply_view(pixels, plain, 32), crop)
    flipped = augmentation.ViewParameters((10, 20, 30, 40), True, (), False, 0.0, False)
    assert np.array_equal(opencv.apply_view(pixels, flipped, 32), crop[:, ::-1])


def test_the_size_is_read_from_the_header():
    assert opencv.jpeg_size(encoded(Image.new("RGB", (300, 200)), "JPEG")) == (300, 200)


LARGE_BOX = (101, 203, 1190, 937)  # of an image of 2001 x 1503
SMALL_BOX = (300, 300, 250, 250)


@pytest.fixture(scope="module")
def large() -> bytes:
    """A photograph of 2001 x 1503 pixels, which no scale divides."""
    return encoded(
        PHOTOGRAPHS[0].resize((2001, 1503), Image.Resampling.BICUBIC), "JPEG", quality=90
    )


def views_of(*boxes):
    plain = augmentation.ViewParameters(boxes[0], False, (), False, 0.0, False)
    return lambda width, height: [dataclasses.replace(plain, box=box) for box in boxes]


@pytest.mark.parametrize(
    ("boxes", "size", "scale"),
    [
        ((LARGE_BOX, LARGE_BOX), 313, 1),
        ((LARGE_BOX, LARGE_BOX), 312, 2),
        ((LARGE_BOX, LARGE_BOX), 156, 4),
        ((LARGE_BOX, LARGE_BOX), 64, 8),
        ((LARGE_BOX, SMALL_BOX), 84, 1),
        ((SMALL_BOX, LARGE_BOX), 83, 2),
    ],
)
def test_a_large_jpeg_is_decoded_as_finely_as_its_views_need(large, boxes, size, scale):
    image, views = opencv.decode_for_views(large, "x", views_of(*boxes), size)
    assert image.shape == (-(-1503 // scale), -(-2001 // scale), 3)
    whole = opencv.decode_array(large, "x")
    for view, box in zip(views, boxes, strict=True):
        made = opencv.apply_view(image, view, size)
        assert difference(made, opencv.resized_crop(whole, box, size)) < TOLERANCE


@pytest.mark.parametrize("kind", ["small", "png", "text after the end"])
def test_others_are_decoded_whole(large, kind):
    photograph = Image.open(io.BytesIO(large))
    content = {
        "small": lambda: encoded(photograph.resize((1500, 1000)), "JPEG"),
        "png": lambda: encoded(photograph, "PNG"),
        "text after the end": lambda: large + b"text",
    }[kind]()
    image, views = opencv.decode_for_views(content, "x", views_of(LARGE_BOX), 96)
    assert image.shape[1] == (1500 if kind == "small" else 2001)
    assert views[0].box == LARGE_BOX
