"""Draw the images that rank first for some queries, right ones green, wrong red, junk grey.

Needs the features that ``eval_retrieval.py --dump-features`` writes; the evaluation draws such
sheets itself with ``--pictures``.
Run as ``python -m tools.show_ranking ...`` from the root of the repository.
"""

import argparse
import logging

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F

from data.image import read_rgb
from data.retrieval import DATASETS, GroundTruth, crop_to_box, read_ground_truth
from evaluation.feature_files import load_features
from evaluation.retrieval_metrics import DIFFICULTIES, rank_images
from utils.errors import UserError
from utils.run import run_script

TILE, BORDER = 128, 6  # pixels
QUERIES, TOP = 8, 10  # rows, and images that rank first
COLOURS = {"right": (30, 160, 60), "wrong": (210, 40, 40), "junk": (150, 150, 150)}


def main() -> None:
    """Rank, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", required=True, help="folder of the data sets")
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0])
    parser.add_argument("--load-features", required=True, metavar="DIR")
    parser.add_argument(
        "--queries", type=int, nargs="+", help=f"numbers (default: the first {QUERIES})"
    )
    parser.add_argument("--top", type=int, default=TOP, help="images a query")
    parser.add_argument("--difficulty", choices=list(DIFFICULTIES), default="medium")
    parser.add_argument("--output", default="ranking.png", help="the picture (.png or .jpg)")
    args = parser.parse_args()
    truth = read_ground_truth(args.data_path, args.dataset)
    numbers = (
        list(range(min(QUERIES, len(truth.queries)))) if args.queries is None else args.queries
    )
    if args.top < 1 or not all(0 <= number < len(truth.queries) for number in numbers):
        raise UserError(f"--queries must be from 0 to {len(truth.queries) - 1}, --top at least 1")
    names = ("train_features.pth", "query_features.pth")
    features, _ = load_features(args.load_features, names, logging.getLogger())
    database, queries = (F.normalize(part).numpy() for part in features)
    if (len(database), len(queries)) != (len(truth.database), len(truth.queries)):
        raise UserError(f"{args.load_features}: not the features of {args.dataset}")
    rankings = rank_images(database, queries[numbers])[:, : args.top]
    try:
        draw_rankings(truth, numbers, rankings, args.difficulty).save(args.output)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.output}: cannot write the picture ({error})") from error


def draw_rankings(
    truth: GroundTruth, numbers: list[int], rankings: np.ndarray, difficulty: str
) -> Image.Image:
    """A row for each query: the query with its box, then the images that rank first.

    Args:
        truth: names, labels and boxes.
        numbers: of the queries, Q of them.
        rankings: (Q, N), numbers of images, the best first.
        difficulty: a key of ``DIFFICULTIES``, which says what is right and what is junk.
    """
    canvas = Image.new("RGB", ((rankings.shape[1] + 1) * TILE, len(numbers) * TILE), "white")
    for row, (number, ranking) in enumerate(zip(numbers, rankings, strict=True)):
        query = read_rgb(truth.path(truth.queries[number]))
        if box := truth.boxes[number]:
            crop_to_box(query, box, truth.queries[number])  # refuses a box beyond the image
            ImageDraw.Draw(query).rectangle(box, outline="yellow", width=query.width // 60 + 1)
        canvas.paste(tile(query, "black"), (0, row * TILE))
        verdicts = judge(truth.labels[number], ranking, difficulty)
        for column, (image, verdict) in enumerate(zip(ranking, verdicts, strict=True), 1):
            shown = read_rgb(truth.path(truth.database[image]))
            canvas.paste(tile(shown, COLOURS[verdict]), (column * TILE, row * TILE))
    return canvas


def judge(labels: dict[str, np.ndarray], ranking: np.ndarray, difficulty: str) -> list[str]:
    """A key of ``COLOURS`` for each image of a ranking."""
    right, junk = (
        np.concatenate([labels[name] for name in part]) for part in DIFFICULTIES[difficulty]
    )
    return [
        "right" if image in right else "junk" if image in junk else "wrong" for image in ranking
    ]


def tile(image: Image.Image, colour: str | tuple[int, int, int]) -> Image.Image:
    """An image within a frame of one colour, on a square."""
    inner = TILE - 2 * BORDER
    return ImageOps.expand(ImageOps.pad(image, (inner, inner), color="white"), BORDER, colour)


if __name__ == "__main__":
    run_script(main)
