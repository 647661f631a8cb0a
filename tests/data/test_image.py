"""What counts as an image of a usual size, how values become 8 bits, and the files' limit."""

import io

import numpy as np
import pytest
from PIL import Image

import data.image
from data.image import decode_rgb, read_file, usual_size
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


def grey_of(values: np.ndarray) -> list[int]:
    """The grey values of a TIFF of float32 after decoding."""
    file = io.BytesIO()
    Image.fromarray(values.astype(np.float32)[None]).save(file, "TIFF")
    image = decode_rgb(file.getvalue(), "x")
    pixels = np.asarray(image)[0]
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


def test_the_largest_value_says_what_white_is():
    """Up to 1 it is 1, up to 255 it is 255, above it is 65535."""
    assert grey_of(np.array([0, 0.5, 1])) == [0, 128, 255]
    assert grey_of(np.array([0, 1, 2])) == [0, 1, 2]
    assert grey_of(np.array([0, 100, 255])) == [0, 100, 255]
    assert grey_of(np.array([0, 256, 65535])) == [0, 1, 255]
    assert grey_of(np.array([0, 257 * 100, 257 * 200])) == [0, 100, 200]
    assert grey_of(np.array([-5, 70000])) == [0, 255]


def test_a_file_may_be_as_large_as_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data.image, "MAX_BYTES", 10)
    path = tmp_path / "x.jpg"
    path.write_bytes(b"1234567890")
    assert read_file(str(path)) == b"1234567890"
    path.write_bytes(b"12345678901")
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image \(the file is too large"):
        read_file(str(path))
