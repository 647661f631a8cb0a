"""Draw a small data set in the format of revisited Oxford and Paris.

A landmark is a facade of coloured windows. Easy images show it whole, hard ones show a part in
other light, and junk ones hardly show it. The rest of the database shows other facades. The first
query has no right image, the second no hard one and the third no junk.

    python -m tools.make_tiny_retrieval FOLDER [--dataset rparis6k]
"""

import pickle
from pathlib import Path

import cv2
import numpy as np

from tools.tiny import drawing_parser, write_image
from utils.run import run_script


def main() -> None:
    """Draw one data set."""
    parser = drawing_parser(
        __doc__,
        ("landmarks", 6, "queries, one a landmark"),
        ("size", 256, "long side of an image in pixels"),
    )
    names = ["roxford5k", "rparis6k"]
    parser.add_argument("--dataset", choices=names, default=names[0], help="its name")
    args = parser.parse_args()
    write_retrieval(args.folder, args.dataset, args.landmarks, args.size, args.seed)


def write_retrieval(
    folder: str, dataset: str = "roxford5k", landmarks: int = 6, size: int = 256, seed: int = 0
) -> str:
    """Write ``<folder>/<dataset>/`` with jpg/ and the ground truth; returns its path."""
    root = Path(folder, dataset)
    truth: dict[str, list] = {"imlist": [], "qimlist": [], "gnd": []}
    for number in range(landmarks):
        rng = np.random.default_rng((seed, number))
        counts = {"easy": 3 if number else 0, "hard": 2 if number > 1 else 0}
        counts |= {"junk": 2 if number != 2 else 0, "other": 3}
        facade = draw_facade(rng)
        entry: dict[str, list] = {}
        for label, count in counts.items():
            entry[label] = list(range(len(truth["imlist"]), len(truth["imlist"]) + count))
            for i in range(count):
                scene = draw_facade(rng) if label == "other" else facade
                name = f"landmark_{number:02}_{label}{i}"
                image, _ = photograph(rng, scene, label, size)
                write_image(root / "jpg" / f"{name}.jpg", image[..., ::-1])
                truth["imlist"].append(name)
        del entry["other"]
        image, entry["bbx"] = photograph(rng, facade, "query", size)
        truth["qimlist"].append(f"landmark_{number:02}_query")
        write_image(root / "jpg" / f"{truth['qimlist'][-1]}.jpg", image[..., ::-1])
        truth["gnd"].append(entry)
    with open(root / f"gnd_{dataset}.pkl", "wb") as file:
        pickle.dump(truth, file, protocol=2)  # as published
    return str(root)


def draw_facade(rng: np.random.Generator) -> np.ndarray:
    """A facade of 160 x 120 pixels, 3 channels of float32."""
    facade = np.full((160, 120, 3), rng.uniform(60, 220, 3), dtype=np.float32)
    colours = rng.uniform(0, 255, (2, 3))
    rows, columns = rng.integers(3, 7, 2)
    for row in range(rows):
        for column in range(columns):
            corner = np.array([column * 120 / columns, row * 160 / rows]) + 4
            end = corner + np.array([120 / columns, 160 / rows]) * rng.uniform(0.4, 0.8, 2)
            colour = colours[int(rng.integers(2))].tolist()
            first, last = (tuple(map(int, point)) for point in (corner, end))
            cv2.rectangle(facade, first, last, colour, -1)
    return facade


def photograph(
    rng: np.random.Generator, facade: np.ndarray, label: str, size: int
) -> tuple[np.ndarray, list[float]]:
    """An image of a facade before a sky, of random sides, and the box of the facade in it."""
    sides = np.array([1.0, rng.uniform(0.6, 0.9)])[:: int(rng.choice([1, -1]))]
    width, height = (size * sides).astype(int).tolist()
    sky = cv2.resize(
        rng.uniform(90, 255, (2, 2, 3)).astype(np.float32), (width, height), None, 0, 0, 1
    )
    zoom = {"hard": rng.uniform(1.1, 1.4), "junk": rng.uniform(0.15, 0.25)}
    scale = zoom.get(label, rng.uniform(0.75, 0.9)) * min(width / 120, height / 160)
    shift = rng.uniform(-0.04, 0.04, 2) * size
    left, top = (np.array([width, height]) - scale * np.array([120, 160])) / 2 + shift
    where = np.array([[scale, 0, left], [0, scale, top]])
    image = cv2.warpAffine(facade, where, (width, height), sky, borderMode=cv2.BORDER_TRANSPARENT)
    light = rng.uniform(0.5, 0.7) if label == "hard" else rng.uniform(0.9, 1.1)
    image = image * light + rng.normal(0, 4, image.shape)
    box = [max(left, 0), max(top, 0), left + scale * 120, top + scale * 160]
    box[2:] = min(box[2], width), min(box[3], height)
    return np.clip(image, 0, 255).astype(np.uint8), [float(side) for side in box]


if __name__ == "__main__":
    run_script(main)
