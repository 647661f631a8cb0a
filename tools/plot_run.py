"""Draw the course of one or several training runs on one sheet.

It reads metrics.jsonl of each run folder, also of a run that is still going on. The heads of a
linear probe are drawn as runs of their own. On the panel of the loss, a triangle is a part of the
run with skipped updates, a dotted line a new start, and grey the epochs with synthetic negatives.

    python -m tools.plot_run RUN_FOLDER [RUN_FOLDER ...] --out FILE
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.pictures import COLOURS, save
from utils.arguments import add_out, command_parser
from utils.config import load_config
from utils.errors import UserError, reading
from utils.run import run_script
from utils.training_log import METRICS

START = "start"  # lines of this kind say where a run went on, and what read_metrics calls them
SMOOTHED = 40  # smoothing averages over one of so many parts of a run

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows."""

    title: str
    label: str
    names: tuple[str, ...]  # of figures in the file; the second is dashed
    scale: float = 1.0


PANELS = (
    Panel("Loss", "loss", ("loss",)),
    Panel("k-NN accuracy of the val images", "top-1 (%)", ("knn",), 100),
    Panel("Linear classifier on the training views", "top-1 (%)", ("probe",), 100),
    Panel("Test images", "metric (%)", ("value",)),
    Panel("Similarity", "mean cosine similarity", ("positive", "negative")),
    Panel("Spread of the features (low: collapse)", "standard deviation", ("feature_std",)),
    Panel("Learning rate", "rate", ("lr",)),
    Panel("Gradient norm", "norm", ("grad_norm",)),
)


def main() -> None:
    """Read, draw, write."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="with a metrics.jsonl")
    add_out(parser, "its ending says the format: .png, .pdf, .svg, .jpg", "run.png")
    args = parser.parse_args()
    if len(args.runs) > len(COLOURS):
        raise UserError(f"{len(args.runs)} runs: at most {len(COLOURS)} can be told apart")
    runs = dict(zip(run_names(args.runs), args.runs, strict=True))
    figure = draw(
        by_head({name: read_metrics(run) for name, run in runs.items()}),
        {name: synthetic_epochs(run) for name, run in runs.items()},
    )
    save(figure, args.out)
    print(f"{args.out} written")


def run_names(folders: list[str]) -> list[str]:
    """The shortest ends of the paths that differ, at least two parts long (model and tag).

    Raises:
        UserError: a folder given twice.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(2, max(map(len, parts)) + 2):
        names = [os.path.join(*p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is given twice")


def read_metrics(folder: str) -> dict[str, Series]:
    """Each figure of a run by name: the epochs made, (N,), and its values, (N,), NaN for null.

    ``START`` has the places where the run went on. A last line that is not complete is left out.

    Raises:
        UserError: a file that is missing, empty or damaged.
    """
    path = os.path.join(folder, METRICS)
    with reading(path, "cannot read the metrics of the run"):
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    columns: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        with reading(f"{path}, line {number}", "damaged, remove the line"):
            content = json.loads(line)
            kind = content.pop("kind", None)
            figures = {
                n: math.nan if value is None else float(value) for n, value in content.items()
            }
            place = figures["epochs"]
        for name, value in (figures if kind != START else {START: place}).items():
            columns.setdefault(name, []).append((place, value))
    known = {name.split("@")[0] for name in columns}
    if not any(name in known for panel in PANELS for name in panel.names):
        raise UserError(f"{path}: no figures yet, the first come after PRINT_FREQ updates")
    return {name: tuple(np.array(rows).T) for name, rows in columns.items()}


def by_head(runs: dict[str, dict[str, Series]]) -> dict[str, dict[str, Series]]:
    """The heads of a probe, whose figures are named ``loss@<rate>``, as runs of their own."""
    split: dict[str, dict[str, Series]] = {}
    for run, series in runs.items():
        for name, values in series.items():
            figure, _, rate = name.partition("@")
            split.setdefault(f"{run}, rate {rate}" if rate else run, {})[figure] = values
    drawn = {name for panel in PANELS for name in panel.names}
    return {run: series for run, series in split.items() if drawn & set(series)}


def synthetic_epochs(folder: str) -> tuple[int, int] | None:
    """Where the epochs with synthetic negatives begin and end, if config.json tells of any."""
    try:
        config = load_config(os.path.join(folder, "config.json"))
    except UserError:
        return None
    keys = config.MODEL
    if keys.TYPE != "synco" or not any(keys[f"N{kind}"] for kind in range(1, 7)):
        return None
    window = keys.WARMUP_EPOCHS, min(keys.COOLDOWN_EPOCHS + 1, config.TRAIN.EPOCHS)
    return window if window[0] < window[1] else None


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average, (N,) -> (N,), over a part of the run; NaN does not count."""
    window = 2 * (len(values) // SMOOTHED // 2) + 1
    known = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, values, 0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def draw(
    runs: dict[str, dict[str, Series]], windows: Mapping[str, tuple[int, int] | None] | None = None
) -> Figure:
    """A sheet with a panel for each figure that a run has.

    Args:
        runs: by name, from ``read_metrics``.
        windows: of the runs that have any, from ``synthetic_epochs``.
    """
    panels = [p for p in PANELS if any(name in run for run in runs.values() for name in p.names)]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 0.8 + 2.8 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    few = len(runs) <= len(COLOURS)
    colours = list(COLOURS if few else colormaps["viridis"](np.linspace(0, 1, len(runs))))
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, runs, colours)
    if panels and panels[0] is PANELS[0]:
        for colour, (name, run) in zip(colours, runs.items(), strict=False):
            _mark_events(grid[0], colour, run)
            if window := (windows or {}).get(name):
                grid[0].axvspan(*window, color="0.5", alpha=0.12, linewidth=0)
    for axes in grid[len(panels) :]:
        axes.remove()
    keys = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours[: len(runs)]]
    figure.legend(keys, runs, loc="outside upper center", ncols=min(3, len(runs)), frameon=False)
    return figure


def _mark_events(axes: Axes, colour: Any, run: dict[str, Series]) -> None:
    """Where updates were skipped, and where the run went on."""
    if "skipped" in run:
        places = run["skipped"][0][run["skipped"][1] > 0]
        at_the_bottom = axes.get_xaxis_transform()
        low = np.full(len(places), 0.03)
        axes.plot(places, low, "^", color=colour, transform=at_the_bottom, label="skipped updates")
    for place in run.get(START, ((), ()))[0]:
        axes.axvline(place, color=colour, linestyle=":", linewidth=1.2)


def _draw_panel(
    axes: Axes, panel: Panel, runs: dict[str, dict[str, Series]], colours: Sequence
) -> None:
    for colour, run in zip(colours, runs.values(), strict=False):
        for name, style in zip(panel.names, ("-", "--"), strict=False):
            if name not in run:
                continue
            epochs, values = run[name][0], panel.scale * run[name][1]
            curve = smooth(values)
            if not np.allclose(curve, values, equal_nan=True):
                axes.plot(epochs, values, color=colour, linewidth=0.7, alpha=0.3)
            # points where a line alone would not show
            axes.plot(
                epochs,
                curve,
                linestyle=style,
                marker="o" if len(values) <= 40 else None,
                markersize=4,
                color=colour,
                linewidth=1.6,
                label=name,
            )
    if len(panel.names) > 1:
        keys = [Line2D([], [], color="0.3", linestyle=style) for style in ("-", "--")]
        axes.legend(keys, panel.names, frameon=False, fontsize="small")
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("epochs")
    axes.set_ylabel(panel.label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_script(main)
