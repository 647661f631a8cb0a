"""Damage at random, and what must come of it."""

import collections
import io
import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from utils.errors import UserError

CASES: collections.Counter = collections.Counter()  # how many were tried, by what they are


def fuzz(examples: int):
    """How many cases, and that they are the same in each run."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        derandomize="FUZZ_RANDOM" not in os.environ,
        deadline=None,
        database=None,
        print_blob=True,
    )


def outcome(name: str, call, *arguments):
    """The result of a call, or None after an error that is fit for a user."""
    CASES[name] += 1
    try:
        return call(*arguments)
    except UserError as error:
        assert str(error) and str(error).isprintable()
        return None


@st.composite
def damage(draw, content: bytes) -> bytes:
    """One to four of: flipped bits, a cut, bytes put in, taken out or overwritten."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "delete", "overwrite"]))
        # headers are short and matter most
        limit = draw(st.sampled_from([64, 1024, len(content)]))
        at = draw(st.integers(0, min(limit, len(data))))
        some = draw(st.binary(min_size=1, max_size=16))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 255]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = some
        elif kind == "delete":
            del data[at : at + len(some)]
        elif kind == "overwrite":
            data[at : at + len(some)] = some
    return bytes(data)


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(len(kind))
    image = Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("PNG"),
    encoded("PNG", "RGBA"),
    encoded("PNG", "P"),
    encoded("PNG", "L"),
    encoded("GIF"),
    encoded("BMP"),
    encoded("PPM"),
    encoded("WEBP"),
    encoded("TIFF"),
    encoded("TIFF", compression="tiff_lzw"),
]
