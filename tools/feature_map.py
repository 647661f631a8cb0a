"""A map of features in the plane."""

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from utils.errors import UserError

METHODS = ("tsne", "umap")
# Okabe and Ito, told apart by colour-blind readers too; with the markers there are enough
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8B7500", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
MOST = len(COLOURS) * len(MARKERS)
OTHERS = "#C8C8C8"
SHEET = 1000  # pixels, of a side of a map of images


def draw_map(
    features: np.ndarray, labels: np.ndarray, classes: list[str], method: str, seed: int
) -> Image.Image:
    """Draw features as points in the plane, like ones close, with a colour and marker per class.

    Classes beyond the ``MOST`` most frequent are drawn in grey.

    Args:
        features: (N, F), L2-normalised.
        labels: (N,), numbers of classes.
        classes: their names.
        method: ``tsne`` or ``umap``.
        seed: of the layout.

    Raises:
        UserError: too few images, or a package is missing.
    """
    points = embed(features, method, seed)
    present, counts = np.unique(labels, return_counts=True)
    shown = sorted(present[np.argsort(-counts, kind="stable")][:MOST].tolist())
    figure = Figure(figsize=(9, 8), dpi=120, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    size = float(np.clip(30000 / len(points), 6, 60))
    rest = ~np.isin(labels, shown)
    if rest.any():
        name = f"{len(present) - len(shown)} more classes"
        x, y = points[rest].T
        axes.scatter(x, y, size / 2, OTHERS, linewidths=0, label=name)
    for number, label in enumerate(shown):
        marker, colour = MARKERS[number // len(COLOURS)], COLOURS[number % len(COLOURS)]
        name = textwrap.shorten(classes[label].replace("_", " "), 28, placeholder="…")
        name = name if name != "…" else classes[label][:27] + "…"
        x, y = points[labels == label].T
        axes.scatter(x, y, size, colour, marker=marker, alpha=0.8, linewidths=0, label=name)
    axes.set_axis_off()
    axes.margins(0.02)
    # beside the map, in as many columns as it takes to be no higher
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        ncols=-(-len(axes.collections) // 28),
        frameon=False,
        fontsize=11,
        markerscale=(50 / size) ** 0.5,
        labelspacing=0.45,
    )
    with io.BytesIO() as buffer:
        figure.savefig(buffer, bbox_inches="tight", pad_inches=0.1)
        return Image.open(buffer).convert("RGB")


def draw_pictures(
    features: np.ndarray, pictures: list[Image.Image], method: str, seed: int
) -> Image.Image:
    """Draw images at the places of their features in the plane, like ones close.

    Args:
        features: (N, F), L2-normalised.
        pictures: N of them.
        method, seed: as for ``draw_map``.

    Raises:
        UserError: too few images, or a package is missing.
    """
    points = embed(features, method, seed)
    places = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)  # 0 to 1
    side = int(np.clip(SHEET / len(pictures) ** 0.5, 24, 120))
    sheet = Image.new("RGB", (SHEET + side, SHEET + side), "white")
    for picture, (x, y) in zip(pictures, places * SHEET, strict=True):
        small = ImageOps.contain(picture, (side, side))
        sheet.paste(small, (round(x), round(y)))
    return sheet


def embed(features: np.ndarray, method: str, seed: int) -> np.ndarray:
    """(N, F) -> (N, 2), by cosine distance.

    Raises:
        UserError: fewer than 3 images, or a package is missing.
    """
    count = len(features)
    if count < 3:
        raise UserError(f"a map needs at least 3 images, got {count}: raise --images")
    options: dict[str, Any]
    try:
        if method == "umap":
            from umap import UMAP as Layout

            options = {"n_neighbors": min(15, count - 1)}
        else:
            from sklearn.manifold import TSNE as Layout

            options = {"perplexity": min(30.0, (count - 1) / 3), "init": "pca"}
    except ImportError as error:
        package = "umap-learn" if method == "umap" else "scikit-learn"
        raise UserError(f"--method {method} needs a package: pip install {package}") from error
    layout = Layout(n_components=2, metric="cosine", random_state=seed, **options)
    return np.asarray(layout.fit_transform(features))
