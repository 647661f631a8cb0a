"""The parts of python -m tools.benchmark about data and features."""

import argparse
import io
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import opencv
from data.augmentation import ViewParameters, draw_view, geometry, view_augmentations
from data.device_views import pack
from evaluation.knn import knn_classify
from tools.benchmark.plain import pil_views
from tools.benchmark.timing import compare


def photographs(count: int, width: int = 500) -> list[bytes]:
    """JPEGs of ``width`` x 3/4 of it, with the detail of photographs: noise of all scales."""
    rng = np.random.default_rng(0)
    size = (width, width * 3 // 4)
    files = []
    for _ in range(count):
        image = np.zeros((*size[::-1], 3), np.float32)
        for side in (3, 8, 20, 60, 150):
            layer = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
            image += np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) / side**0.5
        image *= 255 / image.max()
        file = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def pipeline(args: argparse.Namespace) -> dict:
    """Two views of each JPEG on one core: PIL, OpenCV, and decoding alone; large JPEGs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a data worker has it
    files, large = photographs(args.images), photographs(-(-args.images // 8), 2000)
    kinds = view_augmentations("byol", 0.08)

    def draw(number: int, width: int, height: int) -> list[ViewParameters]:
        return [
            draw_view(np.random.default_rng((0, 0, number, view)), width, height, kind)
            for view, kind in enumerate(kinds)
        ]

    def fast(files: list[bytes]) -> None:
        for i, content in enumerate(files):
            image, views = opencv.decode_for_views(content, "image", partial(draw, i), args.size)
            for view in views:
                opencv.apply_view(image, view, args.size)

    def decoded_whole() -> None:
        """As ``fast`` without JPEGs at reduced scale."""
        for i, content in enumerate(large):
            image = opencv.decode_array(content, "image")
            for view in draw(i, image.shape[1], image.shape[0]):
                opencv.apply_view(image, view, args.size)

    def on_device() -> None:
        """What is left to a worker when the device changes the colours."""
        for i, content in enumerate(files):
            image, views = opencv.decode_for_views(content, "image", partial(draw, i), args.size)
            for view, kind in zip(views, kinds, strict=True):
                pack(view, kind.sigma[1])
                opencv.apply_view(image, geometry(view), args.size)

    def plain() -> None:
        for i, content in enumerate(files):
            pil_views(content, kinds, args.size, np.random.default_rng((0, 0, i)))

    def decode() -> None:
        for content in files:
            opencv.decode_array(content, "image")

    times = compare(
        args.rounds,
        plain=plain,
        fast=lambda: fast(files),
        decode=decode,
        on_device=on_device,
        large=lambda: fast(large),
        large_whole=decoded_whole,
    )
    torch.set_num_threads(threads)
    counts = dict.fromkeys(times, len(files)) | dict.fromkeys(("large", "large_whole"), len(large))
    return {
        **{f"{name}_images_per_s": counts[name] / seconds for name, seconds in times.items()},
        "speedup": times["plain"] / times["fast"],
        "share_of_decode": times["decode"] / times["fast"],
        "device_over_opencv": times["fast"] / times["on_device"],
        "device_share_of_decode": times["decode"] / times["on_device"],
        "large_speedup": times["large_whole"] / times["large"],
    }


def knn(args: argparse.Namespace) -> dict:
    """Four values of k from one pass of similarities, and from one pass each."""
    train = F.normalize(torch.randn(args.features, 384, device=args.device), dim=1)
    test = F.normalize(torch.randn(args.features // 20, 384, device=args.device), dim=1)
    labels = torch.randint(1000, (args.features,), device=args.device)
    ks = [10, 20, 100, 200]

    def classify(ks: list[int]) -> None:
        knn_classify(train, labels, test, ks, 0.07, 1000)

    def passes() -> None:
        for k in ks:
            classify([k])

    times = compare(args.rounds, one_pass=lambda: classify(ks), passes=passes)
    return {"one_pass_s": times["one_pass"], "ratio": times["one_pass"] / times["passes"]}
