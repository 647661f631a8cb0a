"""Compare runs: what differs in their configurations, and their results side by side.

A RUN is a run folder or a results.json. Nothing is refused, but figures on other data or measured
in another way than the first run's are marked.

    python -m tools.compare RUN [RUN ...] [--csv FILE] [--markdown FILE]
"""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.identity import differences, identity_said, measured
from tools.plot_run import run_names
from utils.arguments import command_parser
from utils.config import PLACE, leaves, settings
from utils.errors import UserError, reading
from utils.run import aligned, run_script, write_text

CONFIG, RESULTS = "config.json", "results.json"
# entries of results.json that say how was measured; the others are figures
PROTOCOL = ("dataset", "metric", "weights", "probe", "temperature", "protocol", "selected_on")
# of ``provenance``: what tells runs apart, without what always differs
ORIGIN = ("version", "commit", "modified", "method", "encoder", "key", "epoch", "step", "processes")
OTHER_DATA, OTHER_PROTOCOL = "*", "+"
LEGEND = {
    OTHER_DATA: "on other images than the first run that has this figure, or on unknown ones",
    OTHER_PROTOCOL: "measured in another way than the first run that has this figure, see protocol",
}
MARKS = re.compile(r" ([*+]+)$")
MISSING = "-"


@dataclass(frozen=True)
class Figures:
    """The content of a ``results.json``.

    Attributes:
        figures: by dotted names.
        protocol: how they were measured, by dotted names.
        identity: what else they depend on, as ``evaluation.identity.measured`` has it.
        data: the digest of the list of images, None if it is unknown.
    """

    figures: dict[str, Any]
    protocol: dict[str, Any]
    identity: dict[str, Any]
    data: str | None


@dataclass
class Compared:
    """A run.

    Attributes:
        config: its configuration by dotted keys, without what says where and when alone.
        origin: entries of ``ORIGIN``, by the evaluation's name.
        results: by the evaluation's name.
    """

    config: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Figures] = field(default_factory=dict)


def main() -> None:
    """Read, compare, print and write."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or results.json")
    parser.add_argument("--csv", metavar="FILE", help="write the table there, too")
    parser.add_argument("--markdown", metavar="FILE", help="write it in Markdown there, too")
    args = parser.parse_args()
    paths = list(dict.fromkeys(str(Path(run).resolve()) for run in args.runs))
    rows = table(run_names(paths), [read_run(Path(path)) for path in paths])
    marks = remarks(rows)
    print(aligned(rows), *marks, sep="\n")
    for path, text in ((args.csv, as_csv(rows)), (args.markdown, as_markdown(rows, marks))):
        if path:
            with reading(path, "cannot write the table"):
                Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)


def read_run(path: Path) -> Compared:
    """A run folder with its evaluations, or one ``results.json`` alone.

    Raises:
        UserError: neither is there, or a file is damaged.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*/{RESULTS}")) + sorted(path.glob(RESULTS))
        own = path / CONFIG
    else:
        files, own = [path], path.parent.parent / CONFIG  # of the run that is judged
    if not own.exists():
        own = next((file.parent / CONFIG for file in files), own)
    if not files and not own.exists():
        raise UserError(f"{path}: neither a {RESULTS} nor a folder with a {CONFIG}")
    run = Compared(settings(read_json(own), ~PLACE) if own.exists() else {})
    for file in files:
        results, name = read_json(file), file.resolve().parent.name
        provenance = as_dict(results.pop("provenance", None))
        if isinstance(commit := provenance.get("commit"), str):
            provenance["commit"] = commit[:8]
        run.origin |= {f"{name} {entry}": provenance.get(entry) for entry in ORIGIN}
        flat = dict(leaves(results))
        said = {key: value for key, value in flat.items() if set(key.split(".")) & {*PROTOCOL}}
        figures = {k: v for k, v in flat.items() if k not in said and not k.startswith("per_")}
        data = as_dict(provenance.get("data")).get("digest")
        how = measured(identity_said(provenance))
        run.results[name] = Figures(figures, said, how, data)
    return run


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        UserError: it is missing or no JSON of an object.
    """
    with reading(path, "not JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the JSON of an object")
    return content


def as_dict(value: Any) -> dict[str, Any]:
    """``value`` if it is a dictionary; older results have no ``provenance``."""
    return value if isinstance(value, dict) else {}


def table(names: list[str], runs: list[Compared]) -> list[list[str]]:
    """Rows of cells: a part, a name, and a cell for each run; the first row is the head."""
    rows = [["", "", *names]]
    for part, of_runs in (
        ("configuration", [run.config for run in runs]),
        ("provenance", [run.origin for run in runs]),
        ("protocol", [named(run, "protocol") | named(run, "identity") for run in runs]),
    ):
        for key in keys(of_runs):
            cells = [cell(values.get(key), key in values) for values in of_runs]
            if len(set(cells)) > 1:  # what they share says nothing
                rows.append([part, key, *cells])
    for key in keys([named(run, "figures") for run in runs]):
        evaluation, figure = key.split(" ", 1)
        have = [run.results.get(evaluation) for run in runs]
        first = next(found for found in have if found and figure in found.figures)
        cells = [marked(found, figure, first) for found in have]
        rows.append(["results", key, *cells])
    return rows


def remarks(rows: list[list[str]]) -> list[str]:
    """What the marks in a table mean, a line for each that it has."""
    shown = "".join(found[1] for row in rows for c in row[2:] if (found := MARKS.search(c)))
    return [f"{mark} {said}" for mark, said in LEGEND.items() if mark in shown]


def named(run: Compared, part: str) -> dict[str, Any]:
    """An attribute of the figures of all evaluations of a run, by evaluation and name."""
    return {
        f"{evaluation} {name}": value
        for evaluation, found in run.results.items()
        for name, value in getattr(found, part).items()
    }


def keys(of_runs: list[dict[str, Any]]) -> list[str]:
    """Every key, in the order in which they come."""
    return list(dict.fromkeys(key for values in of_runs for key in values))


def marked(found: Figures | None, figure: str, first: Figures) -> str:
    """The cell of a figure, with the marks of what is other than in ``first``."""
    if not found or figure not in found.figures:
        return MISSING
    other_data = found is not first and (found.data is None or found.data != first.data)
    other = found.protocol != first.protocol or differences(first.identity, found.identity)
    marks = OTHER_DATA * other_data + OTHER_PROTOCOL * bool(other)
    return " ".join(filter(None, (cell(found.figures[figure]), marks)))


def cell(value: Any, known: bool = True) -> str:
    """A value as text, on one line."""
    if not known:
        return MISSING
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else " " for c in text)


def as_csv(rows: list[list[str]]) -> str:
    """Comma-separated values, quoted where needed."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def as_markdown(rows: list[list[str]], marks: list[str]) -> str:
    """A table in Markdown, and a list of what the marks mean."""
    escaped = [[c.replace("|", "\\|").replace("*", "\\*") for c in row] for row in rows]
    escaped.insert(1, ["---"] * len(rows[0]))
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    if marks:
        lines += ["", *(f"- `{mark[0]}`{mark[1:]}" for mark in marks)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
