"""Every kind of image file, by table: both back ends decode the same picture, the right one."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, features
from torchvision.datasets.folder import default_loader

from data.image import FORMATS, decode_rgb
from data.opencv import decode_array
from utils.errors import UserError

# sharp edges, fine grain and odd sides show differences of resampled colours best
_RNG = np.random.default_rng(0)
_COARSE = _RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8).repeat(9, 0).repeat(11, 1)
PIXELS = np.clip(_COARSE + _RNG.normal(0, 12, _COARSE.shape), 0, 255).astype(np.uint8)  # 63x99
COLOUR = Image.fromarray(PIXELS)
GREY = COLOUR.convert("L")
ALPHA = Image.fromarray(np.where(PIXELS[..., 0] > 99, 255, PIXELS[..., 1]).astype(np.uint8))
CLEAR = COLOUR.copy()
CLEAR.putalpha(ALPHA)
SHARE = np.asarray(ALPHA)[..., None] / 255
ON_WHITE = np.round(PIXELS * SHARE + 255 * (1 - SHARE))
GREY_ON_WHITE = np.round(np.asarray(GREY)[..., None] * SHARE + 255 * (1 - SHARE)).repeat(3, 2)
DEEP = PIXELS.astype(np.uint16) * 257  # of 16 bits


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


BEST = {"quality": 100, "subsampling": 0}


def oriented(number: int, kind: str = "JPEG") -> bytes:
    tags = Image.Exif()
    tags[0x0112] = number
    return saved(COLOUR, kind, exif=tags, **BEST)


def by_opencv(pixels: np.ndarray, extension: str, *options: int) -> bytes:
    """Kinds that PIL does not write; ``pixels`` are RGB or RGBA."""
    swapped = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.ndim == 3 else pixels
    return cv2.imencode(extension, swapped, options)[1].tobytes()


def ycck() -> bytes:
    """A JPEG of four colours whose Adobe marker says YCCK."""
    content = bytearray(saved(COLOUR.convert("CMYK"), "JPEG", quality=95))
    if (at := content.find(b"Adobe")) < 0:
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02"
        return bytes(content[:2] + adobe + content[2:])
    content[at + 11] = 2
    return bytes(content)


def with_segment(content: bytes, marker: int, size: int) -> bytes:
    """A JPEG with a further segment in front, such as a profile or a remark."""
    return (
        content[:2]
        + bytes([0xFF, marker])
        + struct.pack(">H", size + 2)
        + b"\xff" * size
        + content[2:]
    )


def with_thumbnail() -> bytes:
    """A JPEG with another JPEG in its EXIF."""
    inner = b"Exif\0\0" + saved(GREY.resize((16, 12)), "JPEG")
    content = saved(COLOUR, "JPEG", **BEST)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + content[2:]


def animation(kind: str, **options) -> bytes:
    second = Image.fromarray(255 - PIXELS)
    return saved(COLOUR, kind, save_all=True, append_images=[second], **options)


def palette(transparent: bool) -> Image.Image:
    image = COLOUR.quantize(64)
    if transparent:
        image.info["transparency"] = 5
    return image


def cleared(clear: np.ndarray, image: Image.Image) -> np.ndarray:
    """An image with white where ``clear`` says so."""
    return np.where(clear[..., None], 255, np.asarray(image.convert("RGB")))


CLEAR_PALETTE = cleared(np.asarray(palette(False)) == 5, palette(False))
ONE_COLOUR = PIXELS[0, 0]

# name: the file, what it shows (None: only the back ends are compared), and the largest difference
# that its compression may make
FILES: dict[str, tuple[bytes, np.ndarray | Image.Image | None, int]] = {
    **{
        f"JPEG {quality} {subsampling} {'progressive' if more else 'baseline'}": (
            saved(COLOUR, "JPEG", quality=quality, subsampling=subsampling, progressive=more),
            None,
            0,
        )
        for quality in (30, 95)
        for subsampling in ("4:4:4", "4:2:2", "4:2:0")
        for more in (False, True)
    },
    "JPEG best": (saved(COLOUR, "JPEG", **BEST), COLOUR, 6),
    "JPEG grey": (saved(GREY, "JPEG", quality=100), GREY, 3),
    "JPEG grey progressive": (saved(GREY, "JPEG", quality=100, progressive=True), GREY, 3),
    "JPEG in RGB": (saved(COLOUR, "JPEG", quality=100, keep_rgb=True), COLOUR, 6),
    "JPEG CMYK": (saved(COLOUR.convert("CMYK"), "JPEG", quality=100), COLOUR, 6),
    "JPEG YCCK": (ycck(), None, 0),
    "JPEG with restarts": (by_opencv(PIXELS, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2), None, 0),
    "JPEG 4:1:1": (
        by_opencv(PIXELS, ".jpg", cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111), None, 0,
    ),
    "JPEG 4:4:0": (
        by_opencv(PIXELS, ".jpg", cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111), None, 0,
    ),
    **{f"JPEG turned {n}": (oriented(n), COLOUR, 6) for n in range(1, 9)},
    "JPEG with a profile": (with_segment(saved(COLOUR, "JPEG"), 0xE2, 60_000), None, 0),
    "JPEG with a remark": (with_segment(saved(COLOUR, "JPEG"), 0xFE, 9), None, 0),
    "JPEG with a thumbnail": (with_thumbnail(), COLOUR, 6),
    "JPEG with more behind": (saved(COLOUR, "JPEG") + b"more", None, 0),
    "JPEG with zeros behind": (saved(COLOUR, "JPEG") + bytes(99), None, 0),
    "JPEGs of a phone": (animation("MPO", **BEST), COLOUR, 6),
    "JPEG of one pixel": (saved(COLOUR.crop((0, 0, 1, 1)), "JPEG"), None, 0),
    "JPEG of 20 000 pixels": (saved(COLOUR.resize((20_000, 300)), "JPEG"), None, 0),
    "PNG": (saved(COLOUR, "PNG"), COLOUR, 0),
    "PNG grey": (saved(GREY, "PNG"), GREY, 0),
    "PNG of 1 bit": (saved(GREY.convert("1"), "PNG"), GREY.convert("1"), 0),
    "PNG of 16 bits, grey": (by_opencv(DEEP[..., 0], ".png"), PIXELS[..., :1].repeat(3, 2), 0),
    "PNG of 16 bits": (by_opencv(DEEP, ".png"), COLOUR, 0),
    "PNG of 16 bits, clear": (by_opencv(np.dstack([DEEP, DEEP[..., :1] * 0]), ".png"),
                              np.full_like(PIXELS, 255), 0),
    "PNG clear": (saved(CLEAR, "PNG"), ON_WHITE, 1),
    "PNG grey, clear": (saved(CLEAR.convert("LA"), "PNG"), GREY_ON_WHITE, 1),
    "PNG with a palette": (saved(palette(False), "PNG"), palette(False), 0),
    "PNG with a clear palette": (saved(palette(True), "PNG"), CLEAR_PALETTE, 0),
    "PNG with a clear colour": (
        saved(COLOUR, "PNG", transparency=tuple(ONE_COLOUR.tolist())),
        cleared((PIXELS == ONE_COLOUR).all(2), COLOUR),
        0,
    ),
    "PNG turned": (oriented(6, "PNG"), COLOUR, 0),
    "PNG of one pixel": (saved(GREY.crop((0, 0, 1, 1)), "PNG"), None, 0),
    "PNG of 20 000 pixels": (saved(GREY.resize((200, 20_000)), "PNG"), None, 0),
    "WebP": (saved(COLOUR, "WEBP", quality=90), None, 0),
    "WebP exact": (saved(COLOUR, "WEBP", lossless=True), COLOUR, 0),
    "WebP clear": (saved(CLEAR, "WEBP", lossless=True, exact=True), ON_WHITE, 1),
    "WebP animated": (animation("WEBP", lossless=True), COLOUR, 0),
    "TIFF": (saved(COLOUR, "TIFF"), COLOUR, 0),
    "TIFF packed": (saved(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR, 0),
    "TIFF CMYK": (saved(COLOUR.convert("CMYK"), "TIFF"), COLOUR, 0),
    "TIFF of 1 bit": (saved(GREY.convert("1"), "TIFF", compression="group4"), GREY.convert("1"), 0),
    "TIFF of 16 bits": (saved(Image.fromarray(DEEP[..., 0]), "TIFF"),
                        PIXELS[..., :1].repeat(3, 2), 0),
    "TIFF of pages": (animation("TIFF"), COLOUR, 0),
    "TIFF clear": (saved(CLEAR, "TIFF"), ON_WHITE, 1),
    "BMP": (saved(COLOUR, "BMP"), COLOUR, 0),
    "BMP grey": (saved(GREY, "BMP"), GREY, 0),
    "BMP with a palette": (saved(palette(False), "BMP"), palette(False), 0),
    "BMP of 1 bit": (saved(GREY.convert("1"), "BMP"), GREY.convert("1"), 0),
    "GIF": (saved(palette(False), "GIF"), palette(False), 0),
    "GIF's first frame": (
        saved(palette(False), "GIF", save_all=True, append_images=[GREY]), palette(False), 0,
    ),
    "GIF clear": (saved(palette(True), "GIF", transparency=5), CLEAR_PALETTE, 0),
    "PPM": (saved(COLOUR, "PPM"), COLOUR, 0),
    "PGM of 16 bits": (saved(Image.fromarray(DEEP[..., 0].astype(np.int32)), "PPM"),
                       PIXELS[..., :1].repeat(3, 2), 0),
}  # fmt: skip
if "AVIF" in FORMATS:
    FILES["AVIF"] = (saved(COLOUR, "AVIF", quality=100, subsampling="4:4:4"), COLOUR, 12)
    FILES["AVIF clear"] = (saved(CLEAR, "AVIF"), None, 0)

# where ImageFolder takes the highest bits, or the colour that a clear pixel has
OTHER_THAN_TORCHVISION = ("clear", "16 bits")


def difference(one, other) -> int:
    one, other = (np.asarray(image, np.int16) for image in (one, other))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("name", FILES)
def test_back_ends_decode_the_same_picture(name, recwarn):
    content, _, _ = FILES[name]
    fast, slow = decode_array(content, name), decode_rgb(content, name)
    assert fast.dtype == np.uint8 and fast.flags.writeable
    assert slow.mode == "RGB"
    assert difference(fast, slow) <= 2
    assert not recwarn.list


@pytest.mark.parametrize("name", [n for n, (_, shown, _) in FILES.items() if shown is not None])
@pytest.mark.parametrize("decode", [decode_array, decode_rgb])
def test_it_is_the_picture_that_was_stored(name, decode):
    content, shown, tolerance = FILES[name]
    picture = shown.convert("RGB") if isinstance(shown, Image.Image) else shown
    assert difference(decode(content, name), picture) <= tolerance


@pytest.mark.parametrize(
    "name", [name for name in FILES if not any(word in name for word in OTHER_THAN_TORCHVISION)]
)
def test_it_is_the_picture_of_torchvisions_image_folder(tmp_path, name):
    """Whatever the file is called, and however it says that it should be turned."""
    path = tmp_path / "x.JPEG"
    path.write_bytes(FILES[name][0])
    assert difference(decode_rgb(FILES[name][0], name), default_loader(str(path))) == 0


@pytest.mark.parametrize("decode", [decode_array, decode_rgb])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
def test_a_bomb_is_named(monkeypatch, decode, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS.shape[0] * PIXELS.shape[1] - 1)
    with pytest.raises(UserError, match=r"bomb\.jpg: not a readable image"):
        decode(saved(COLOUR, kind), "bomb.jpg")


def test_avif_is_known_where_pillow_has_it():
    assert ("AVIF" in FORMATS) == bool("avif" in features.modules and features.check("avif"))
