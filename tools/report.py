"""One page of a run: its course, its figures, and pictures of what it has learned.

The page is one HTML file that needs no network. Accuracies are those that the evaluations of RUN
and of the runs beside it have written. The pictures are drawn from the run's checkpoint and the
images where its config.json says. What is missing is left out, and the page says so.

    python -m tools.report RUN [--beside RUN ...] [--out FILE]
"""

import argparse
import base64
import html
import io
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from data.opening import DataPath, open_splits
from data.source import ImageSource, PartOfSource
from evaluation.baselines import BASELINES
from evaluation.pictures import (
    GREY,
    NEUTRAL,
    RIGHT,
    Subject,
    draw_attention,
    draw_components,
    draw_features,
    draw_neighbours,
    draw_similarity,
)
from models.patch_features import has_class_token
from models.pretrained import build_pretrained_encoder
from tools import plot_run
from tools.compare import CONFIG, Compared, read_run, remarks, table
from tools.visualize import choose
from utils.arguments import command_parser
from utils.checkpoint import LATEST
from utils.config import DEFAULTS, as_dict, leaves, load_config, with_values
from utils.errors import UserError, reading
from utils.run import Run, run_script, start, write_text

TRAIN, MAP, QUERIES, PATCHES = 10_000, 600, 8, 6  # images: neighbours among, map, rows, patches
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem;
       padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
/* wide pictures and tables keep their size, and scroll where the page is narrower */
figure, .table { margin: 1rem 0; overflow-x: auto; scrollbar-gutter: stable; }
img { display: block; } figcaption { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.85rem; white-space: nowrap; }
th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; }
.left-out { color: #555; } summary { cursor: pointer; font-size: 1.2rem; margin-top: 2.5rem; }
"""
ABOUT = (
    "SynCo, MoBY and BYOL train an encoder of images without labels: views of one image shall get "
    "features close together, and those of different images features apart. This page shows how "
    "well the features tell classes apart, how the training went, and what the encoder sees."
)


def main() -> None:
    """Read the run, draw what it has, and write the page."""
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of pre-training")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN", help="runs to show its figures beside"
    )
    where = "the page (default: RUN/report/index.html)"
    parser.add_argument("--out", "--output", metavar="FILE", help=where)
    where = "folder of the data set (default: where config.json says)"
    parser.add_argument("--data-path", metavar="DIR", help=where)
    parser.add_argument("--title", help="heading of the page (default: method and encoder)")
    since = "seconds of the epoch: show how long ago it was"
    parser.add_argument("--since", type=float, metavar="TIME", help=since)
    args = parser.parse_args()
    folder = Path(args.run)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{args.run}: no {CONFIG} there: give the run folder of a pre-training")
    changes: dict[str, Any] = {"OUTPUT": str(folder.resolve().parents[1]), "AMP_OPT_LEVEL": "O0"}
    if args.data_path:
        changes["DATA.DATA_PATH"] = args.data_path
    config = with_values(load_config(str(folder / CONFIG)), changes)
    run = start(config, str(folder / "report"))
    paths = [folder, *map(Path, args.beside)]
    names = plot_run.run_names(list(map(str, paths))) if len(paths) > 1 else [folder.name]
    figures = dict(zip(names, [read_run(path) for path in paths], strict=True))
    out = args.out or os.path.join(run.folder, "index.html")
    text = page(
        args.title or f"{config.MODEL.TYPE} with {config.MODEL.ENCODER}",
        facts(config, args.since),
        sections(config, run, figures, folder),
        folded(config, figures),
    )
    with reading(out, "cannot write the page"):
        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    print(f"{out} written")


def page(title: str, lines: list[str], parts: dict[str, str], folded: str) -> str:
    """The whole page as HTML.

    Args:
        title: of the page.
        lines: what was done.
        parts: HTML by title.
        folded: HTML that is shown when asked for.
    """
    title = html.escape(title)
    body = [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in (ABOUT, *lines))]
    body += [f"<h2>{html.escape(name)}</h2>\n{part}" for name, part in parts.items()]
    body.append(f"<details><summary>Settings and provenance</summary>\n{folded}</details>")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{title}</title><style>{STYLE}</style></head>"
    joined = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">{head}<body>\n{joined}\n</body></html>\n'


def attempt(draw: Callable[[], str]) -> str:
    """What ``draw`` gives, or a sentence that says why it is left out."""
    try:
        return draw()
    except UserError as error:
        return f'<p class="left-out">Left out: {html.escape(str(error))}.</p>'


def picture(figure: Figure, caption: str) -> str:
    """A picture with a caption, kept in the page itself."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png")
        code = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    source = f"data:image/png;base64,{code}"
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def facts(config: Any, since: float | None) -> list[str]:
    """What was done, in one or two lines."""
    data = f"the images of {config.DATA.DATA_PATH} at {config.DATA.IMG_SIZE} pixels"
    lines = [f"{config.TRAIN.EPOCHS} epochs on {data}, no labels."]
    if since is not None:
        lines.append(f"{time.time() - since:.0f} seconds from the first command to this page.")
    return lines


def sections(config: Any, run: Run, figures: dict[str, Compared], folder: Path) -> dict[str, str]:
    """The parts of the page by their titles."""
    images = cache(lambda: open_splits(DataPath.of(config), labelled=False))
    encoders = cache(lambda: [load(config, run, random) for random in (True, False)])

    def subject(encoder: nn.Module, count: int) -> Subject:
        return Subject(config, choose(images()[1], count, config), encoder, run)

    def both(draw: Callable[[Subject], Figure], count: int) -> str:
        shown = [draw(subject(encoder, count)) for encoder in encoders()]
        return picture(shown[0], "Before training.") + picture(shown[1], "After training.")

    def neighbours(of: Subject) -> Figure:
        return draw_neighbours(of, spread(images()[0], TRAIN), 4)

    def results() -> str:
        if not any(of.results for of in figures.values()):
            raise UserError("no evaluation has written results.json into the run folder")
        return of_table(figures, ("results",))

    def patches() -> str:
        of = subject(encoders()[1], PATCHES)
        if has_class_token(of.encoder):
            where = picture(draw_attention(of), "Attention of the class token.")
        else:
            where = picture(draw_similarity(of), "Where the feature of the image comes from.")
        return where + picture(draw_components(of), "What looks alike to the encoder.")

    try:
        classes = len(images()[0].classes)
    except UserError:
        classes = 0
    return {
        "Accuracy": attempt(results)
        + attempt(lambda: accuracy(figures, config.DATA.DATASET, classes)),
        "Course of the run": attempt(lambda: course(folder)),
        "Nearest neighbours": attempt(lambda: both(neighbours, QUERIES)),
        "Map of the features": attempt(lambda: both(draw_features, MAP)),
        "Patches": attempt(patches),
    }


def accuracy(figures: dict[str, Compared], dataset: str, classes: int) -> str:
    """Bars of the k-NN accuracy of each run that has one, for one k that all have."""
    found = {name: knn_figures(run, dataset) for name, run in figures.items()}
    found = {name: values for name, values in found.items() if values}
    shared = sorted(set.intersection(*map(set, found.values()))) if found else []
    if not shared:
        raise UserError("no k-NN figures; if the images have classes, eval_knn.py gives them")
    k = 20 if 20 in shared else shared[0]
    bars = {name: values[k] for name, values in sorted(found.items(), key=lambda i: i[1][k])}
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = [RIGHT if name == next(iter(figures)) else GREY for name in bars]
    words = [os.path.basename(name).replace("_", " ") for name in bars]
    axes.bar_label(axes.barh(words, list(bars.values()), color=colours), fmt="%.1f%%", padding=4)
    said = f"Share of validation images whose class {k} nearest training images vote for."
    if classes > 1:
        axes.axvline(100 / classes, color=NEUTRAL, linestyle="--")
        said += f" Dashed: chance, {100 / classes:.1f}%."
    axes.set(xlim=(0, 100), xlabel=f"{k}-NN accuracy of the validation images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return picture(figure, said)


def knn_figures(run: Compared, dataset: str) -> dict[int, float]:
    """The top-1 accuracy in per cent by k of a run's encoder, or of a baseline in its folder."""
    names = [f"knn_{dataset}", *(f"knn_{dataset}_{baseline}" for baseline in BASELINES)]
    for results in filter(None, map(run.results.get, names)):
        top1 = {
            int(name.split(".")[1]): float(value)
            for name, value in results.figures.items()
            if name.startswith("knn.") and name.endswith(".top1")
        }
        if top1:
            return top1
    return {}


def course(folder: Path) -> str:
    """The curves of ``tools.plot_run``."""
    runs = plot_run.by_head({folder.name: plot_run.read_metrics(str(folder))})
    window = plot_run.synthetic_epochs(str(folder))
    figure = plot_run.draw(runs, {folder.name: window})
    said = ["Figures of the run by epoch."]
    if any(line.get_alpha() for axes in figure.axes for line in axes.lines):
        said.append("Thin: what was written. Thick: smoothed.")
    if window:
        said.append("Grey: the epochs with synthetic negatives.")
    return picture(figure, " ".join(said))


def load(config: Any, run: Run, random: bool) -> nn.Module:
    """The run's encoder, or the one that it began with."""
    torch.manual_seed(config.SEED)
    args = argparse.Namespace(
        pretrained=os.path.join(os.path.dirname(run.folder), LATEST),
        random_weights=random,
        key="encoder",
    )
    return build_pretrained_encoder(args, config, run.logger.info)[0].to(run.device)


def spread(source: ImageSource, most: int) -> ImageSource:
    """At most ``most`` images, evenly spread."""
    count = len(source.names)
    return PartOfSource(source, np.linspace(0, count - 1, min(most, count)).round().astype(int))


def of_table(figures: dict[str, Compared], parts: Sequence[str]) -> str:
    """Some parts of the table of ``tools.compare``, its head at least."""
    head, *rows = table(list(figures), list(figures.values()))
    rows = [row for row in rows if row[0] in parts]
    return as_html([head, *rows]) + "".join(f"<p>{html.escape(line)}</p>" for line in remarks(rows))


def as_html(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the head."""

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    rest = "\n".join(row(cells, "td") for cells in rows[1:])
    return f'<div class="table"><table>{row(rows[0], "th")}{rest}</table></div>'


def folded(config: Any, figures: dict[str, Compared]) -> str:
    """The keys that differ from the defaults, and what else differs between the runs."""
    defaults = dict(leaves(as_dict(DEFAULTS)))
    changed = [
        [key, str(value)] for key, value in leaves(as_dict(config)) if value != defaults.get(key)
    ]
    also = of_table(figures, ("configuration", "provenance", "protocol"))
    return as_html([["key that is not at its default", "value"], *changed]) + also


if __name__ == "__main__":
    run_script(main)
