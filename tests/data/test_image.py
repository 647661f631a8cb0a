"""What counts as an image of a usual size, how values become 8 bits, and the files' limit."""

import io

import numpy as np
import pytest
from PIL import Image

import data.image
from data.image import decode_rgb, read_file, usual_size
from data.opencv import decode_array
from utils.errors import UserError


@pytest.mark.parametrize(
    ("width", "height", "usual"),
    [
        *((1, 1, True), (0, 0, False), (0, 5, False), (5, 0, False)),
        *((100, 1, True), (101, 1, False), (1, 100, True), (1, 101, False)),
        *((300, 3, True), (301, 3, False)),
    ],
)
def test_neither_empty_nor_a_thread(width, height, usual):
    assert usual_size(width, height) == usual


def test_nor_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert usual_size(20, 30) and not usual_size(20, 31)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert usual_size(100_000, 100_000)


def file_of(values, kind: str, dtype) -> bytes:
    """A row of values as a file; a PGM has two bytes a value, the larger first."""
    row = np.array(values, dtype)[None]
    if kind == "PGM":
        return b"P5 %d 1 65535\n" % row.size + row.astype(">u2").tobytes()
    file = io.BytesIO()
    Image.fromarray(row).save(file, kind)
    return file.getvalue()


# the values of a file, and the grey that each becomes
SCALED = [
    *(
        (kind, np.uint16, values, greys)
        for kind in ("TIFF", "PNG", "PGM")
        for values, greys in (
            ([0, 257 * 100, 65535], [0, 100, 255]),
            ([0, 257, 255], [0, 1, 1]),  # however dark
            ([1, 128, 129], [0, 0, 1]),
        )
    ),
    ("TIFF", np.int32, [0, 257 * 100, 65535], [0, 100, 255]),
    ("TIFF", np.int32, [0, 100, 255], [0, 0, 1]),
    ("TIFF", np.float32, [0, 0.5, 1], [0, 128, 255]),
    ("TIFF", np.float32, [0, 1, 2], [0, 1, 2]),
    ("TIFF", np.float32, [0, 100, 255], [0, 100, 255]),
]
REFUSED = [
    (np.int32, [0, 65536]),
    (np.int32, [-1, 5]),
    (np.int32, [0, 2**31 - 1]),
    (np.float32, [0, 256]),
    (np.float32, [-0.1, 1]),
    (np.float32, [0, np.nan]),
    (np.float32, [0, np.inf]),
    (np.float32, [-np.inf, 1]),
]
DECODERS = (decode_rgb, decode_array)  # of pil, and of opencv and device
every_decoder = pytest.mark.parametrize("decode", DECODERS)


@every_decoder
@pytest.mark.parametrize(("kind", "dtype", "values", "greys"), SCALED)
def test_what_values_mean_follows_from_their_type(decode, kind, dtype, values, greys):
    """Not from the largest in the image, but for floats of up to 1."""
    pixels = np.asarray(decode(file_of(values, kind, dtype), "x"))[0]
    assert (pixels == pixels[:, :1]).all()
    assert pixels[:, 0].tolist() == greys


@every_decoder
@pytest.mark.parametrize(("dtype", "values"), REFUSED)
def test_values_that_mean_nothing_are_refused(decode, dtype, values):
    with pytest.raises(
        UserError, match=r"^x\.tif: not a readable image \(its values, from"
    ) as error:
        decode(file_of(values, "TIFF", dtype), "x.tif")
    assert "\n" not in str(error.value)


def test_a_file_may_be_as_large_as_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data.image, "MAX_BYTES", 10)
    path = tmp_path / "x.jpg"
    path.write_bytes(b"1234567890")
    assert read_file(str(path)) == b"1234567890"
    path.write_bytes(b"12345678901")
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image \(the file is too large"):
        read_file(str(path))
