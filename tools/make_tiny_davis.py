"""Draw a small data set in the format of DAVIS 2017: flat-coloured objects that move.

The list val.txt names plain videos and some of unusual kinds: ``portrait``, ``odd`` sides,
``late`` (frames numbered from 37 on), ``vanish`` (the second object leaves for good), ``appear``
(a second object that the first frame does not have) and ``single`` (one frame).
Run as ``python -m tools.make_tiny_davis FOLDER`` from the root of the repository.
"""

import argparse
import os

import cv2
import numpy as np

from data.davis import RESOLUTION, write_mask

UNUSUAL = ("portrait", "odd", "late", "vanish", "appear", "single")
COLOURS = np.array([[220, 40, 40], [40, 60, 220], [240, 220, 60]])  # of the objects, RGB


def main() -> None:
    """Draw one data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where JPEGImages/, Annotations/ and ImageSets/ are written")
    parser.add_argument("--videos", type=int, default=2, help="videos beside the unusual ones")
    parser.add_argument("--frames", type=int, default=10, help="frames a video")
    parser.add_argument("--height", type=int, default=240, help="of a frame in pixels")
    parser.add_argument("--width", type=int, default=427, help="of a frame in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    plain = [f"plain{number}" for number in range(args.videos)]
    write_davis(args.folder, plain + list(UNUSUAL), args.frames, args.height, args.width, args.seed)


def write_davis(
    folder: str, names: list[str], frames: int, height: int, width: int, seed: int = 0
) -> None:
    """Write videos and their list; a name of ``UNUSUAL`` says what is unusual."""
    lists = os.path.join(folder, "ImageSets", "2017")
    os.makedirs(lists, exist_ok=True)
    with open(os.path.join(lists, "val.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    for number, name in enumerate(names):
        shape = {"portrait": (width, height), "odd": (height - 3, width - 8)}
        h, w = shape.get(name, (height, width))
        count = 1 if name == "single" else frames
        rng = np.random.default_rng((seed, number))
        images, masks = (
            os.path.join(folder, kind, RESOLUTION, name) for kind in ("JPEGImages", "Annotations")
        )
        for part in (images, masks):
            os.makedirs(part, exist_ok=True)
        for i, (image, mask) in enumerate(draw_video(rng, count, h, w, name)):
            stem = f"{i + 37 * (name == 'late'):05}"
            cv2.imwrite(os.path.join(images, f"{stem}.jpg"), image[..., ::-1])
            write_mask(os.path.join(masks, f"{stem}.png"), mask)


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
    main()
