"""What k-nearest neighbours found: right and wrong ones, and the classes that are confused."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from data.source import ImageSource
from tools.sheet import RIGHT, WRONG, Tile, draw_sheet, fit
from tools.visualize import neighbour_tiles

QUERIES, NEIGHBOURS = 5, 8  # rows of right and as many of wrong queries; columns
PAIRS = 20  # that a confusion matrix shows


@dataclass(frozen=True)
class Judged:
    """What the classes of the test images were judged to be.

    Attributes:
        train, test: images of the same classes.
        train_features, test_features: theirs, N x F and M x F, L2-normalised.
        judged: the class of each test image by its neighbours, (M,).
        k: the number of neighbours that voted.
    """

    train: ImageSource
    test: ImageSource
    train_features: torch.Tensor
    test_features: torch.Tensor
    judged: np.ndarray
    k: int

    @property
    def right(self) -> np.ndarray:
        """Whether each test image was judged right, (M,)."""
        return self.judged == np.asarray(self.test.labels)


def draw_neighbours(found: Judged, seed: int) -> Image.Image:
    """Rows of queries that were judged right, then wrong, each with its nearest training images.

    Args:
        found: images, features and verdicts.
        seed: of the draw of the queries.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for verdict, mark, colour in ((True, "✓", RIGHT), (False, "✗", WRONG)):
        (numbers,) = np.nonzero(found.right == verdict)
        for index in rng.permutation(numbers)[:QUERIES].tolist():
            own = found.test.classes[found.test.labels[index]]
            said = own if verdict else f"{own}: {found.test.classes[found.judged[index]]}"
            query = Tile(fit(found.test.read_image(index)), f"{mark} {said}", colour)
            rows.append([query, *neighbour_tiles(found.train, nearest(found, index), own)])
    note = (
        f"Left a query that {found.k}-NN judged right (✓) or wrong (✗, its class: what it was "
        "judged to be), then its nearest training images with their cosine similarity."
    )
    return draw_sheet(rows, (note,))


def nearest(found: Judged, index: int) -> list[tuple[float, int]]:
    """Cosine similarity and number of the training images nearest to test image ``index``."""
    query = found.test_features[index].to(found.train_features)
    similarities = found.train_features @ query  # N
    best = similarities.topk(min(NEIGHBOURS, len(similarities)))
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))


def confused_pairs(labels: np.ndarray, judged: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of classes that are taken for each other most often, the worst first.

    Args:
        labels, judged: the class of each image, (M,), and what it was judged to be.
    """
    both = np.stack([labels, judged], 1)[labels != judged]
    pairs, counts = np.unique(np.sort(both, 1), axis=0, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:PAIRS]
    return [(int(a), int(b)) for a, b in pairs[worst]]


def confusion(labels: np.ndarray, judged: np.ndarray, classes: list[int]) -> np.ndarray:
    """Images of each of ``classes``, in rows, by what they were judged to be, in columns."""
    return np.array([[np.sum((labels == a) & (judged == b)) for b in classes] for a in classes])


def draw_confusion(found: Judged, path: str) -> None:
    """Draw the confusion matrix of the pairs of classes that are confused most, if any are."""
    labels = np.asarray(found.test.labels)
    pairs = confused_pairs(labels, found.judged)
    if not pairs:
        return
    shown = list(dict.fromkeys(number for pair in pairs for number in pair))
    counts = confusion(labels, found.judged, shown)
    totals = np.array([np.sum(labels == number) for number in shown])
    shares = counts / np.maximum(totals, 1)[:, None]
    side = 1.5 + 0.32 * len(shown)
    figure = Figure(figsize=(side + 1, side), dpi=120, facecolor="white")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    edge = tuple(channel / 255 for channel in WRONG)
    for pair in pairs:
        a, b = (shown.index(number) for number in pair)
        for row, column in ((a, b), (b, a)):
            if counts[row, column]:
                frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=edge)
                axes.add_patch(frame)
    names = [found.test.classes[number] for number in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_xlabel(f"judged to be, by {found.k}-NN")
    axes.set_ylabel("class of the image")
    axes.set_title(
        f"Framed: the {len(pairs)} pairs of classes that are confused most.\n"
        "Numbers of images; dark is a large share of the class.",
        fontsize=9,
    )
    figure.savefig(path, bbox_inches="tight")
