"""Pictures of what an encoder sees and finds: grids of images with captions, maps and curves.

Right is blue, wrong is orange, in every picture.
"""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from yacs.config import CfgNode

from data.dataset import to_tensor
from data.davis import Video, draw_mask, palette, read_frame, read_mask
from data.image import read_rgb
from data.loader import normalize
from data.retrieval import GroundTruth, crop_to_box
from data.source import ImageSource
from evaluation.features import encode_images
from evaluation.retrieval_metrics import DIFFICULTIES
from models.patch_features import class_attention, patch_features
from utils.errors import UserError, reading
from utils.run import Run

# told apart by colour-blind readers too (Okabe and Ito), the yellow left out
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
RIGHT, WRONG = COLOURS[:2]
NEUTRAL, GREY = "#3C3C3C", "#C8C8C8"
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
SIDE, GAP, LINE = 1.8, 0.1, 0.25  # inches: of a tile, between tiles, of a line of text
PIXELS = 200  # of the longer side of a tile
BICUBIC = Image.Resampling.BICUBIC
LAYOUTS = ("tsne", "umap")
QUERIES, TOP = 8, 10  # of a picture of rankings: rows, and images that rank first

Verdict = Literal["right", "wrong", "junk"]
VERDICTS = {"right": ("✓ ", RIGHT), "wrong": ("✗ ", WRONG), "junk": ("", GREY)}


@dataclass
class Tile:
    """A picture of a grid.

    Attributes:
        image: of any size.
        caption: below it.
        verdict: what its frame and mark say.
        heat: h x w values to lay over it, dark to bright on a scale of their own.
    """

    image: Image.Image
    caption: str = ""
    verdict: Verdict | None = None
    heat: np.ndarray | None = None


def grid(rows: Sequence[Sequence[Tile]], note: str = "") -> Figure:
    """Tiles in rows and columns, each above its caption, and a note at the end."""
    columns = max(map(len, rows))
    width = columns * (SIDE + GAP) + GAP
    lines = textwrap.wrap(note, int(12 * width))
    height = len(rows) * (SIDE + LINE + GAP) + (len(lines) + 1) * LINE
    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(
        *(GAP / width, (len(lines) + 1) * LINE / height, 1 - GAP / width, 1 - GAP / height),
        *(GAP / SIDE, (LINE + GAP) / SIDE),
    )
    for places, tiles in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for number, place in enumerate(places):
            if number < len(tiles):
                _draw_tile(place, tiles[number])
            else:
                place.set_axis_off()
    figure.text(GAP / width, GAP / height, "\n".join(lines), color=NEUTRAL)
    return figure


def _draw_tile(place: Any, tile: Tile) -> None:
    image = ImageOps.contain(tile.image.convert("RGB"), (PIXELS, PIXELS))
    mark, colour = VERDICTS[tile.verdict] if tile.verdict else ("", NEUTRAL)
    if tile.heat is None:
        place.imshow(image)
    else:
        extent = place.imshow(image.convert("L"), cmap="gray").get_extent()
        place.imshow(tile.heat, "inferno", alpha=0.65, extent=extent, interpolation="bicubic")
    place.set(xticks=[], yticks=[], anchor="S")
    place.spines[:].set(visible=tile.verdict is not None, color=colour, linewidth=4)
    caption = mark + " ".join(tile.caption.split())
    place.set_xlabel(caption if len(caption) < 25 else f"{caption[:23]}…", color=colour, fontsize=9)


def save(figure: Figure, path: str) -> None:
    """Write a figure into a file whose ending says the format, .png, .pdf, .svg or .jpg.

    Raises:
        UserError: another ending, or a file that cannot be written.
    """
    with reading(path, "cannot write the picture"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path)


def caption(images: ImageSource, index: int) -> str:
    """The class of an image, or the name of its file."""
    if has_classes(images):
        return images.classes[images.labels[index]]
    return os.path.basename(images.names[index])


def has_classes(images: ImageSource) -> bool:
    """Whether images are told apart by their classes; a single class tells nothing."""
    return len(images.classes) > 1 and bool((images.labels >= 0).all())


def neighbour_tiles(
    train: ImageSource, similarities: torch.Tensor, count: int, own: str | None
) -> list[Tile]:
    """The training images nearest to a query, each with its cosine similarity and class.

    Args:
        train: N training images.
        similarities: theirs to the query, (N,).
        count: of tiles.
        own: the query's class, which is right; None if nothing is right or wrong.
    """
    tiles = []
    best = similarities.topk(min(count, len(similarities)))
    for similarity, key in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        name = caption(train, key)
        verdict: Verdict | None = None if own is None else "right" if name == own else "wrong"
        tiles.append(Tile(train.read_image(key), f"{similarity:.2f} {name}", verdict))
    return tiles


def draw_judged(
    train: ImageSource,
    test: ImageSource,
    features: tuple[torch.Tensor, torch.Tensor],
    judged: np.ndarray,
    k: int,
    seed: int,
) -> Figure:
    """Five queries that k-NN judged right, then five wrong ones, each with eight neighbours.

    Args:
        train, test: N and M images of the same classes.
        features: theirs, N x F and M x F, L2-normalised.
        judged: the class that k-NN gave each test image, (M,).
        k: the number of neighbours that voted.
        seed: of the draw of the queries.
    """
    rng = np.random.default_rng(seed)
    right = judged == np.asarray(test.labels)
    rows = []
    for wanted in (True, False):
        for index in rng.permutation(np.nonzero(right == wanted)[0])[:5].tolist():
            own = test.classes[test.labels[index]]
            said = own if wanted else f"{own}: {test.classes[judged[index]]}"
            query = Tile(test.read_image(index), said, "right" if wanted else "wrong")
            similarities = features[0] @ features[1][index].to(features[0])
            rows.append([query, *neighbour_tiles(train, similarities, 8, own)])
    note = (
        f"Left a query that {k}-NN judged right (✓) or wrong (✗, its class: what it was judged "
        "to be), then its nearest training images with their cosine similarity."
    )
    return grid(rows, note)


def confused_pairs(labels: np.ndarray, judged: np.ndarray, most: int = 20) -> list[tuple[int, int]]:
    """The pairs of classes that are taken for each other most often, the worst first.

    Args:
        labels, judged: the class of each image, (M,), and what it was judged to be.
        most: so many pairs.
    """
    both = np.stack([labels, judged], 1)[labels != judged]
    pairs, counts = np.unique(np.sort(both, 1), axis=0, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:most]
    return [(int(a), int(b)) for a, b in pairs[worst]]


def draw_confusion(
    labels: np.ndarray, judged: np.ndarray, classes: list[str], k: int
) -> Figure | None:
    """The confusion matrix of the pairs of classes that k-NN confuses most; None without any."""
    pairs = confused_pairs(labels, judged)
    if not pairs:
        return None
    shown = list(dict.fromkeys(number for pair in pairs for number in pair))
    counts = np.array([[np.sum((labels == a) & (judged == b)) for b in shown] for a in shown])
    shares = counts / np.maximum([[np.sum(labels == number)] for number in shown], 1)
    side = 1.5 + 0.32 * len(shown)
    figure = Figure(figsize=(side + 1, side), dpi=120)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        if count and (shown[row], shown[column]) in {*pairs, *(pair[::-1] for pair in pairs)}:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=WRONG))
    names = [classes[number] for number in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set(xlabel=f"judged to be, by {k}-NN", ylabel="class of the image")
    axes.set_title(
        f"Framed: the {len(pairs)} pairs of classes that are confused most.\n"
        "Numbers of images; dark is a large share of the class.",
        fontsize=9,
    )
    return figure


def draw_rankings(
    truth: GroundTruth, numbers: list[int], rankings: np.ndarray, difficulty: str
) -> Figure:
    """A row for each query: the query with its box, then the images that rank first.

    Args:
        truth: names, labels and boxes.
        numbers: of the queries, Q of them.
        rankings: (Q, N), numbers of images, the best first.
        difficulty: a key of ``DIFFICULTIES``, which says what is right and what is junk.
    """
    rows = []
    for number, ranking in zip(numbers, rankings, strict=True):
        query = read_rgb(truth.path(truth.queries[number]))
        if box := truth.boxes[number]:
            crop_to_box(query, box, truth.queries[number])  # refuses a box beyond the image
            ImageDraw.Draw(query).rectangle(box, outline="yellow", width=query.width // 60 + 1)
        row = [Tile(query, f"query {number}")]
        verdicts = judge_ranking(truth.labels[number], ranking, difficulty)
        for place, (image, verdict) in enumerate(zip(ranking, verdicts, strict=True), 1):
            row.append(Tile(read_rgb(truth.path(truth.database[image])), str(place), verdict))
        rows.append(row)
    note = "Left the query, then what ranks first: right ✓, wrong ✗, grey: does not count ({})."
    return grid(rows, note.format(difficulty))


def judge_ranking(
    labels: dict[str, np.ndarray], ranking: np.ndarray, difficulty: str
) -> list[Verdict]:
    """The verdict on each image of a ranking."""
    right, junk = (
        np.concatenate([labels[name] for name in part]) for part in DIFFICULTIES[difficulty]
    )
    return [
        "right" if image in right else "junk" if image in junk else "wrong" for image in ranking
    ]


def overlays(video: Video, masks: list[str], paths: list[str]) -> None:
    """Draw the masks of a video over its frames.

    Args:
        video: of N frames.
        masks: their files, N.
        paths: the pictures to write, N.
    """
    for frame_path, mask_path, path in zip(video.frames, masks, paths, strict=True):
        frame = read_frame(frame_path)
        mask = read_mask(mask_path, frame.shape[:2])
        Image.fromarray(draw_mask(frame, mask)).save(path, quality=95)


def film(frames: list[str], path: str, longest: int = 480) -> None:
    """Write images of one size as an animated GIF that runs for ever, made smaller if need be."""

    def small(frame: str) -> Image.Image:
        image = read_rgb(frame)
        image.thumbnail((longest, longest))
        return image

    others = (small(frame) for frame in frames[1:])  # one at a time: they take memory
    # DAVIS has 24 frames a second, and GIF counts in hundredths of one
    small(frames[0]).save(path, save_all=True, append_images=others, duration=40, loop=0)


def draw_scores(scored: dict[str, dict[str, dict[str, list[float]]]]) -> Figure:
    """The mean of J and F over the frames, a panel for each video, a line for each object.

    Objects have the colours of their masks.

    Args:
        scored: by the video's name, the object's name and ``J`` or ``F`` the frames that count,
            from the second on.
    """
    panels = {name: objects for name, objects in scored.items() if objects}
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 2.1 * rows + 0.4), dpi=120, layout="constrained")
    all_axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (video, objects) in zip(all_axes, panels.items(), strict=False):
        curves = {k: np.mean([of["J"], of["F"]], axis=0) for k, of in objects.items()}
        for name, curve in curves.items():
            colour = palette()[int(name.rpartition("_")[2])] / 255
            axes.plot(range(1, len(curve) + 1), curve, color=colour)
        mean = np.mean([curve.mean() for curve in curves.values()])
        axes.set_title(f"{video}: {mean:.3f}", fontsize=9)
        axes.set(ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.supxlabel("frame", fontsize=9)
    figure.supylabel("J&F", fontsize=9)
    return figure


@dataclass(frozen=True)
class Subject:
    """What a picture of an encoder is of.

    Attributes:
        config: sizes of images, the data set, the seed.
        images: those that are drawn.
        encoder: in eval mode, on the device of ``run``.
        run: device and precision.
    """

    config: CfgNode
    images: ImageSource
    encoder: nn.Module
    run: Run

    @torch.inference_mode()
    def of_patches(
        self, function: Callable[..., torch.Tensor], size: int | None
    ) -> list[torch.Tensor]:
        """``function(encoder, image)`` of each image by itself, since their sizes differ.

        Args:
            function: gives (1, ...).
            size: short side in pixels at which images are encoded; default: twice DATA.IMG_SIZE.
        """
        found = []
        for index in range(len(self.images.names)):
            image = resized(
                self.images.read_image(index), size or 2 * self.config.DATA.IMG_SIZE, self.encoder
            )
            pixels = to_tensor(np.asarray(image))[None].to(self.run.device)
            with self.run.precision.autocast():
                values = function(self.encoder, normalize(pixels))
            found.append(values[0].float().cpu())
        return found

    def tiles(self) -> list[Tile]:
        """Each image with its class or name."""
        images = self.images
        return [Tile(images.read_image(i), caption(images, i)) for i in range(len(images.names))]


def resized(image: Image.Image, size: int, encoder: nn.Module, widest: int = 4) -> Image.Image:
    """The image with a short side of about ``size`` and whole patches on both sides.

    One whose long side would be more than ``widest`` times as long is made smaller.
    """
    infos = getattr(encoder, "feature_info", None) or [{"reduction": 32}]
    patch = infos[-1]["reduction"]
    scale = min(size / min(image.size), widest * size / max(image.size))
    sides = [max(patch, round(side * scale / patch) * patch) for side in image.size]
    return image.resize(tuple(sides), BICUBIC)


def in_lines(tiles: list[Tile], across: int) -> list[list[Tile]]:
    """Rows of ``across`` tiles."""
    return [tiles[i : i + across] for i in range(0, len(tiles), across)]


def draw_attention(subject: Subject, size: int | None = None) -> Figure:
    """For each image the attention of the class token: the mean of the heads, then each head."""
    rows = []
    attention = subject.of_patches(class_attention, size)  # heads x h x w each
    for tile, heads in zip(subject.tiles(), attention, strict=True):
        named = {"mean": heads.mean(0), **{f"head {i}": head for i, head in enumerate(heads, 1)}}
        drawn = [Tile(tile.image, name, heat=values.numpy()) for name, values in named.items()]
        lines = -(-(len(drawn) + 1) // 8)  # no more than 8 side by side
        rows += in_lines([tile, *drawn], -(-(len(drawn) + 1) // lines))
    note = "Attention of the class token in the last block, dark to bright, each on its own scale."
    return grid(rows, note)


def draw_similarity(subject: Subject, size: int | None = None) -> Figure:
    """Each image beside the cosine similarity of its patches to their mean.

    It is for encoders that average their patches, and have no class token.
    """
    tiles = []
    all_patches = subject.of_patches(patch_features, size)  # h x w x C each
    for tile, patches in zip(subject.tiles(), all_patches, strict=True):
        values = F.cosine_similarity(patches, patches.mean((0, 1)), dim=2)
        tiles += [tile, Tile(tile.image, "similarity to the mean", heat=values.numpy())]
    note = "Similarity of each patch to the mean of all, dark to bright, each on its own scale."
    return grid(in_lines(tiles, 6), note)


def draw_components(subject: Subject, size: int | None = None, foreground: bool = False) -> Figure:
    """Each image beside its patches coloured by ``principal_colours``."""
    coloured = principal_colours(subject.of_patches(patch_features, size), foreground)
    tiles = []
    for tile, colours in zip(subject.tiles(), coloured, strict=True):
        drawn = Image.fromarray((255 * colours).round().astype(np.uint8))
        tiles += [tile, Tile(drawn.resize(tile.image.size, BICUBIC), "components")]
    across = min(4, max(1, round((len(tiles) / 2) ** 0.5)))  # pairs side by side
    note = "First three principal components of the patch features of all images: red, green, blue."
    return grid(in_lines(tiles, 2 * across), note)


def principal_colours(features: list[torch.Tensor], foreground: bool = False) -> list[np.ndarray]:
    """The first three principal components of all patches together, scaled to colours.

    Args:
        features: (h, w, C) for each image.
        foreground: split the patches by the first component, leave the side with more of the
            images' borders white, and colour the rest by its own components.

    Returns:
        (h, w, 3) for each image, from 0 to 1.
    """
    rows = torch.cat([f.flatten(0, 1) for f in features]).double()  # PxC
    keep = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        borders = [torch.ones(f.shape[:2], dtype=torch.bool) for f in features]
        for border in borders:
            border[1:-1, 1:-1] = False
        keep = principal_components(rows, 1)[:, 0] > 0
        keep ^= keep[torch.cat([border.flatten() for border in borders])].float().mean() >= 0.5
    scores = principal_components(rows[keep], 3)
    # the farthest patches would leave little contrast to the others
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    colours = torch.ones(len(rows), 3, dtype=torch.float64)
    colours[keep] = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([f.shape[0] * f.shape[1] for f in features])
    return [p.view(*f.shape[:2], 3).numpy() for p, f in zip(parts, features, strict=True)]


def principal_components(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(P, C) -> coordinates on the ``count`` directions of most variance, (P, count)."""
    centered = rows - rows.mean(0)
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -count:].flip(1)
    # a direction's sign is arbitrary: its largest entry is made positive
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return centered @ (directions * largest.sign())


def draw_neighbours(subject: Subject, train: ImageSource, count: int = 8) -> Figure:
    """A row for each image: it, then its nearest training images with their similarities.

    Args:
        subject: the queries, and what encodes them.
        train: among which neighbours are sought.
        count: neighbours of a query.

    Raises:
        UserError: training images of several classes each.
    """
    config, images = subject.config, subject.images
    if np.ndim(train.labels) > 1:
        raise UserError(f"{config.DATA.DATASET} has several classes an image, neighbours need one")
    keys, queries = (
        encode_images(config, subject.encoder, part, subject.run, normalize=True)[0]
        for part in (train, images)
    )
    known = has_classes(images) and has_classes(train)
    rows = [
        [tile, *neighbour_tiles(train, similarities, count, tile.caption if known else None)]
        for tile, similarities in zip(subject.tiles(), queries @ keys.T, strict=True)
    ]
    return grid(
        rows, "Left the query, then the nearest training images with their cosine similarity."
    )


def draw_features(subject: Subject, method: str = LAYOUTS[0]) -> Figure:
    """The features of the images in the plane: points coloured by class, else the images.

    Args:
        subject: the images, and what encodes them.
        method: of ``LAYOUTS``.
    """
    config, images = subject.config, subject.images
    features, labels = encode_images(config, subject.encoder, images, subject.run, normalize=True)
    points = lay_out(features.numpy(), method, config.SEED)
    if has_classes(images):
        return draw_map(points, labels.numpy(), images.classes)
    return draw_images([tile.image for tile in subject.tiles()], points)


def draw_map(points: np.ndarray, labels: np.ndarray, classes: list[str]) -> Figure:
    """Points in the plane, (N, 2), with a colour and a marker for each class.

    Classes beyond the most frequent ones that can be told apart are drawn in grey.

    Args:
        points: (N, 2).
        labels: (N,), numbers of classes.
        classes: their names.
    """
    present, counts = np.unique(labels, return_counts=True)
    most = len(COLOURS) * len(MARKERS)
    shown = sorted(present[np.argsort(-counts, kind="stable")][:most].tolist())
    figure = Figure(figsize=(9, 8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(30000 / len(points), 6, 60))
    if len(shown) < len(present):
        name = f"{len(present) - len(shown)} more classes"
        x, y = points[~np.isin(labels, shown)].T
        axes.scatter(x, y, size / 2, GREY, label=name)
    for number, label in enumerate(shown):
        name = textwrap.shorten(classes[label].replace("_", " "), 28, placeholder="…")
        name = name if name != "…" else classes[label][:27] + "…"
        marker, colour = MARKERS[number // len(COLOURS)], COLOURS[number % len(COLOURS)]
        x, y = points[labels == label].T
        axes.scatter(x, y, size, colour, marker=marker, alpha=0.8, linewidths=0, label=name)
    axes.set_axis_off()
    columns = -(-len(axes.collections) // 28)  # beside the map, no higher than it
    figure.legend(loc="outside right upper", ncols=columns, frameon=False)
    figure.set_figwidth(9 + 2.6 * columns)
    axes.set_title(f"{len(points)} images: close together are those with like features")
    return figure


def draw_images(pictures: Sequence[Image.Image], points: np.ndarray) -> Figure:
    """Images at their points in the plane, (N, 2)."""
    places = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)  # 0 to 1
    figure = Figure(figsize=(10, 10), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    half = float(np.clip(0.5 / len(pictures) ** 0.5, 0.012, 0.06))  # of a square for an image
    for picture, (x, y) in zip(pictures, places, strict=True):
        small = ImageOps.contain(picture, (PIXELS, PIXELS))
        w, h = (half * side / max(small.size) for side in small.size)
        axes.imshow(small, extent=(x - w, x + w, y - h, y + h))
    axes.set(xlim=(-half, 1 + half), ylim=(-half, 1 + half))
    axes.set_axis_off()
    return figure


def lay_out(features: np.ndarray, method: str, seed: int) -> np.ndarray:
    """(N, F) -> (N, 2), by cosine distance.

    Args:
        features: L2-normalised.
        method: of ``LAYOUTS``.
        seed: of the layout.

    Raises:
        UserError: fewer than 3 images, or a package is missing.
    """
    count = len(features)
    if count < 3:
        raise UserError(f"a map needs at least 3 images, got {count}: raise --images")
    options: dict[str, Any]
    try:
        if method == "umap":
            from umap import UMAP as Layout  # optional, as scikit-learn is

            options = {"n_neighbors": min(15, count - 1)}
        else:
            from sklearn.manifold import TSNE as Layout

            options = {"perplexity": min(30.0, (count - 1) / 3), "init": "pca"}
    except ImportError as error:
        package = "umap-learn" if method == "umap" else "scikit-learn"
        raise UserError(f"--method {method} needs a package: pip install {package}") from error
    layout = Layout(n_components=2, metric="cosine", random_state=seed, **options)
    return np.asarray(layout.fit_transform(features))
