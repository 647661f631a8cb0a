"""Draw a small data set in the format of DAVIS 2017: flat-coloured objects that move.

The list val.txt names plain videos and some of unusual kinds: ``portrait``, ``odd`` sides,
``late`` (frames numbered from 37 on), ``vanish`` (the second object leaves for good), ``appear``
(a second object that the first frame does not have) and ``single`` (one frame).

    python -m tools.make_tiny_davis FOLDER [--videos 2]
"""

from pathlib import Path

import cv2
import numpy as np

from data.davis import RESOLUTION, write_mask
from tools.tiny import drawing_parser, write_image, write_lines
from utils.run import run_script

UNUSUAL = ("portrait", "odd", "late", "vanish", "appear", "single")
COLOURS = np.array([[220, 40, 40], [40, 60, 220], [240, 220, 60]])  # of the objects, RGB


def main() -> None:
    """Draw one data set."""
    args = drawing_parser(
        __doc__,
        ("videos", 2, "videos beside the unusual ones"),
        ("frames", 10, "frames a video"),
        ("height", 240, "of a frame in pixels"),
        ("width", 427, "of a frame in pixels"),
    ).parse_args()
    plain = [f"plain{number}" for number in range(args.videos)]
    write_davis(args.folder, plain + list(UNUSUAL), args.frames, args.height, args.width, args.seed)


def write_davis(
    folder: str, names: list[str], frames: int, height: int, width: int, seed: int = 0
) -> None:
    """Write videos and their list; a name of ``UNUSUAL`` says what is unusual."""
    root = Path(folder)
    write_lines(root / "ImageSets/2017/val.txt", names)
    for number, name in enumerate(names):
        shape = {"portrait": (width, height), "odd": (height - 3, width - 8)}
        h, w = shape.get(name, (height, width))
        count = 1 if name == "single" else frames
        rng = np.random.default_rng((seed, number))
        images, masks = (root / kind / RESOLUTION / name for kind in ("JPEGImages", "Annotations"))
        masks.mkdir(parents=True, exist_ok=True)
        for i, (image, mask) in enumerate(draw_video(rng, count, h, w, name)):
            stem = f"{i + 37 * (name == 'late'):05}"
            write_image(images / f"{stem}.jpg", image)
            write_mask(str(masks / f"{stem}.png"), mask)


def draw_video(
    rng: np.random.Generator, frames: int, height: int, width: int, kind: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (H, W, 3) and masks (H, W) of uint8; the objects cross the frame in opposite ways."""
    grey = rng.uniform(70, 150, (5, 8, 1)).astype(np.float32)
    background = cv2.resize(grey, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    y, x = np.mgrid[:height, :width]
    radius = 0.17 * min(height, width)
    colours = rng.permutation(COLOURS)
    video = []
    for frame in range(frames):
        image, mask = np.repeat(background, 3, 2), np.zeros((height, width), np.uint8)
        share = frame / max(frames - 1, 1)
        for number in (1, 2):
            if number == 2 and (
                (kind == "vanish" and share > 0.4) or (kind == "appear" and share < 0.4)
            ):
                continue
            along = 0.2 + 0.6 * (share if number == 1 else 1 - share)
            across = 0.3 if number == 1 else 0.7
            cx, cy = (along, across) if width > height else (across, along)
            dx, dy = np.abs(x - cx * width), np.abs(y - cy * height)
            inside = np.hypot(dx, dy) < radius if number == 1 else np.maximum(dx, dy) < radius
            image[inside], mask[inside] = colours[number], number
        image = cv2.GaussianBlur(image, (0, 0), 0.7) + rng.normal(0, 3, image.shape)
        video.append((np.clip(image, 0, 255).astype(np.uint8), mask))
    return video


if __name__ == "__main__":
    run_script(main)
