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
from collections.abc import Callable
from dataclasses import dataclass
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
from utils.errors import UserError
from utils.run import Run, run_script, start, write_text

TRAIN, MAP, QUERIES, PATCHES = 10_000, 600, 8, 6  # images: neighbours among, map, rows, patches
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem;
       padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { flex: 1 1 26rem; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; }
.head { font-size: 1.2rem; } .left-out { color: #555; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, and HTML below it."""

    title: str
    body: str


def main() -> None:
    """Read the run, draw what it has, and write the page."""
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of pre-training")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN", help="runs to show its figures beside"
    )
    where = "the page (default: RUN/report/index.html)"
    parser.add_argument("--out", "--output", metavar="FILE", help=where)
    parser.add_argument(
        "--data-path", help="folder of the data set (default: where config.json says)"
    )
    parser.add_argument("--title", help="heading of the page (default: method and encoder)")
    parser.add_argument(
        "--since", type=float, metavar="TIME", help="seconds of the epoch: show how long ago it was"
    )
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
    sections = [
        accuracy(figures, config.DATA.DATASET),
        Section("Course of the run", attempt(lambda: course(folder))),
        *pictures(config, run),
        Section("Figures", attempt(lambda: of_table(figures))),
        settings(config),
    ]
    out = args.out or os.path.join(run.folder, "index.html")
    title = args.title or f"{config.MODEL.TYPE} with {config.MODEL.ENCODER}"
    lines = facts(config, figures[names[0]], args.since)
    try:
        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page(title, lines, sections))
    except OSError as error:
        raise UserError(f"{out}: cannot write the page ({error.strerror})") from error
    print(f"{out} written")


def page(title: str, lines: list[str], sections: list[Section]) -> str:
    """The whole page as HTML."""
    head = f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="head">{html.escape(line)}</p>' for line in lines]
    parts += [f"<h2>{html.escape(part.title)}</h2>\n{part.body}" for part in sections]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    head = f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>'
    return f"{head}<body>\n{body}\n</body></html>\n"


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


def facts(config: Any, run: Compared, since: float | None) -> list[str]:
    """What was done, in one or two lines."""
    data = f"the images of {config.DATA.DATA_PATH} at {config.DATA.IMG_SIZE} pixels"
    lines = [f"{config.TRAIN.EPOCHS} epochs on {data}, no labels."]
    if since is not None:
        lines.append(f"{time.time() - since:.0f} seconds from the first command to this page.")
    return lines


def accuracy(figures: dict[str, Compared], dataset: str) -> Section:
    """Bars of the k-NN accuracy of each run that has one, for one k that all have."""
    found = {name: knn_figures(run, dataset) for name, run in figures.items()}
    found = {name: values for name, values in found.items() if values}
    shared = sorted(set.intersection(*map(set, found.values()))) if found else []
    title = "Accuracy"
    if not shared:
        text = "Left out: no k-NN figures. If the images have classes, eval_knn.py gives them."
        return Section(title, f'<p class="left-out">{text}</p>')
    k = 20 if 20 in shared else shared[0]
    bars = {name: values[k] for name, values in sorted(found.items(), key=lambda i: i[1][k])}
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    best = next(iter(figures))
    colours = [RIGHT if name == best else GREY for name in bars]
    drawn = axes.barh([os.path.basename(name) for name in bars], list(bars.values()), color=colours)
    axes.bar_label(drawn, fmt="%.1f%%", padding=4)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{k}-NN accuracy of the validation images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return Section(
        title,
        picture(
            figure,
            f"Share of validation images whose class {k} "
            "nearest training images vote for, in per cent.",
        ),
    )


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
    windows = {folder.name: plot_run.synthetic_epochs(str(folder))}
    said = "Thin: what was written. Thick: smoothed. Grey: the epochs with synthetic negatives."
    return picture(plot_run.draw(runs, windows), said)


def pictures(config: Any, run: Run) -> list[Section]:
    """Neighbours before and after, map, and patches."""
    titles = ("Nearest neighbours", "Map of the features", "Patches")
    try:
        train, val = open_splits(DataPath.of(config), labelled=False)
        trained, untrained = (load(config, run, random) for random in (False, True))
    except UserError as error:
        reason = f'<p class="left-out">Left out: {html.escape(str(error))}.</p>'
        return [Section(title, reason) for title in titles]
    bodies = (
        lambda: neighbours(config, run, val, train, (untrained, trained)),
        lambda: feature_map(config, run, val, (untrained, trained)),
        lambda: patches(config, run, val, trained),
    )
    return [Section(t, attempt(body)) for t, body in zip(titles, bodies, strict=True)]


def load(config: Any, run: Run, random: bool) -> nn.Module:
    """The run's encoder, or the one that it began with."""
    torch.manual_seed(config.SEED)
    args = argparse.Namespace(
        pretrained=os.path.join(os.path.dirname(run.folder), LATEST),
        random_weights=random,
        key="encoder",
    )
    return build_pretrained_encoder(args, config, run.logger.info)[0].to(run.device)


def pair(before: Figure, after: Figure) -> str:
    """Two pictures side by side."""
    shown = picture(before, "Before training.") + picture(after, "After training.")
    return f'<div class="pair">{shown}</div>'


def neighbours(
    config: Any, run: Run, val: ImageSource, train: ImageSource, encoders: tuple[nn.Module, ...]
) -> str:
    """Sheets of the same queries by both encoders."""
    queries = choose(val, QUERIES, config)
    among = spread(train, TRAIN)
    sheets = [draw_neighbours(Subject(config, queries, e, run), among, 4) for e in encoders]
    return pair(*sheets)


def feature_map(config: Any, run: Run, val: ImageSource, encoders: tuple[nn.Module, ...]) -> str:
    """Maps of the same validation images by both encoders."""
    shown = choose(val, MAP, config)
    return pair(*(draw_features(Subject(config, shown, e, run)) for e in encoders))


def patches(config: Any, run: Run, val: ImageSource, encoder: nn.Module) -> str:
    """Components, and attention; for an encoder without a class token the similarity."""
    subject = Subject(config, choose(val, PATCHES, config), encoder, run)
    if has_class_token(encoder):
        where = picture(draw_attention(subject), "Attention of the class token.")
    else:
        where = picture(draw_similarity(subject), "Where the feature of the image comes from.")
    return where + picture(draw_components(subject), "What looks alike to the encoder.")


def spread(source: ImageSource, most: int) -> ImageSource:
    """At most ``most`` images, evenly spread."""
    count = len(source.names)
    return PartOfSource(source, np.linspace(0, count - 1, min(most, count)).round().astype(int))


def of_table(figures: dict[str, Compared]) -> str:
    """The table of ``tools.compare``."""
    rows = table(list(figures), list(figures.values()))
    if len(rows) == 1:
        raise UserError("no evaluation has written results.json into the run folder")
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in remarks(rows))
    return as_html(rows) + notes


def as_html(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the head."""

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{row(rows[0], 'th')}" + "\n".join(row(r, "td") for r in rows[1:]) + "</table>"


def settings(config: Any) -> Section:
    """The keys that differ from the defaults."""
    defaults = dict(leaves(as_dict(DEFAULTS)))
    changed = [
        [key, str(value)] for key, value in leaves(as_dict(config)) if value != defaults.get(key)
    ]
    return Section("Settings that are not the defaults", as_html([["key", "value"], *changed]))


if __name__ == "__main__":
    run_script(main)
