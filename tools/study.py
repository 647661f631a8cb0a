"""Compare settings over several seeds: train and judge every run, then one table.

    python -m tools.study FILE [--jobs N] [--part I/N] [--table]

FILE is YAML, see docs/studies.md. The same command continues a study that was stopped: runs that
are finished stay, and one that was stopped goes on from its checkpoint.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools import plot_run
from tools.compare import as_csv, as_markdown, read_json
from utils.arguments import number_in
from utils.config import load_config, to_json
from utils.distributed import processors
from utils.errors import UserError
from utils.run import aligned, run_script, write_text

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "study.json"  # in a run folder: what it was started with
LOG = "study.log"
NEIGHBOURS = 20
OWN = {"SEED", "MODEL.NAME", "OUTPUT", "TAG"}  # keys that a run gets from its place in a study


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        cfg: the recipe that all runs share.
        data_path: folder of the data set.
        output: where run folders and tables are written.
        settings: keys that differ from the recipe, by the setting's name.
        seeds: of the setting of that name.
        processes: of a run.
        opts: keys that differ from the recipe in all runs.
    """

    cfg: str
    data_path: str
    output: str
    settings: dict[str, dict[str, Any]]
    seeds: dict[str, list[int]]
    processes: int = 1
    opts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run of a study: a setting with a seed.

    Attributes:
        setting: its name.
        seed: of the run.
        opts: all keys that differ from the recipe.
        folder: the run folder.
        made: what it is made of: the whole configuration, the data path, the processes.
    """

    setting: str
    seed: int
    opts: dict[str, Any]
    folder: Path
    made: dict[str, Any]

    def results(self) -> Path:
        """Where its k-NN figures are written."""
        return self.folder / f"knn_{self.made['DATA']['DATASET']}" / "results.json"


class Runs:
    """Runs the jobs of a study, several at a time, in processes that a signal to stop reaches.

    Args:
        study: what the jobs share.
        at_a_time: how many.
    """

    def __init__(self, study: Study, at_a_time: int) -> None:
        self.study, self.at_a_time = study, at_a_time
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        # else the threads of one run would wait for those of another
        threads = max(1, processors() // (at_a_time * study.processes))
        self._environment = {"OMP_NUM_THREADS": str(threads)} | os.environ

    def make(self, jobs: list[Job]) -> list[str]:
        """Make the runs; returns what went wrong, a line each.

        SIGTERM and Ctrl-C let those that are under way save and end, and begin no other.
        """
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.at_a_time) as pool:
                return [said for said in pool.map(self._make, jobs) if said]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        for process in list(self._running):
            process.terminate()

    def _make(self, job: Job) -> str | None:
        """Train and judge; returns what went wrong, in a line, or None."""
        if self.stopped:
            return None
        study = self.study
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text(str(job.folder / SETTINGS), json.dumps(job.made, indent=2))
        common = ["--cfg", study.cfg, "--data-path", study.data_path, "--output", study.output]
        common += ["--tag", job.folder.name, "--opts", *flat(job.opts)]
        launch = [sys.executable]
        if study.processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={study.processes}"]
        knn = [sys.executable, str(ROOT / "eval_knn.py"), "--nb-knn", str(NEIGHBOURS), *common]
        for command in ([*launch, str(ROOT / "main_pretrain.py"), *common], knn):
            if self._run(command, job.folder / LOG):
                why = "stopped, the same command continues it" if self.stopped else "failed"
                return f"{job.setting}, seed {job.seed}: {why} (see {job.folder / LOG})"
        print(f"{job.setting}, seed {job.seed}: {figure(job):.2f}", flush=True)
        return None

    def _run(self, command: list[str], log: Path) -> int:
        """The exit code of a command, whose output goes to the end of ``log``."""
        with open(log, "ab") as file:
            # in a session of its own, so that a Ctrl-C of the terminal comes from here alone
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )
            self._running.add(process)
            try:
                if self.stopped:  # while it was started
                    process.terminate()
                return process.wait()
            finally:
                self._running.discard(process)


def main() -> None:
    """Run what is missing, then write the table and the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="the study, in YAML")
    parser.add_argument(
        "--jobs",
        type=number_in(1, 1000),
        default=1,
        metavar="N",
        help="runs at a time (default: 1)",
    )
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="run only every Nth, as task I of an array of N",
    )
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    args = parser.parse_args()
    study = read_study(args.file)
    jobs = list_jobs(study)
    failed: list[str] = []
    if not args.table:
        part, parts = read_part(args.part)
        own = [job for job in jobs[part - 1 :: parts] if not finished(job)]
        print(f"{len(jobs)} runs, {len(own)} of them to do here", flush=True)
        runs = Runs(study, int(args.jobs))
        failed = runs.make(own)
        if runs.stopped:
            failed = [*failed, "stopped: the same command goes on with the study"]
    rows = table(jobs)
    print(aligned(rows))
    tables = os.path.join(study.output, Path(args.file).stem)  # studies may share an output
    os.makedirs(study.output, exist_ok=True)
    write_text(f"{tables}.csv", as_csv(rows))
    write_text(f"{tables}.md", as_markdown(rows, []))
    draw(jobs, f"{tables}.png")
    print(f"{tables}.md, .csv and .png written")
    if failed:
        raise UserError("; ".join(failed))


def read_study(path: str) -> Study:
    """Read and check a study's file.

    Raises:
        UserError: missing, malformed, or with an unknown key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a list of keys and values")
    content = dict(content)
    shared = content.pop("seeds", None)
    settings, seeds = {}, {}
    for name, keys in as_mapping(path, "settings", content.pop("settings", None)).items():
        keys = dict(as_mapping(path, f"settings {name}", keys or {}))
        seeds[str(name)] = seed_list(path, keys.pop("seeds", shared))
        settings[str(name)] = keys
    missing = {"cfg", "data_path", "output"} - set(content)
    unknown = set(content) - {"cfg", "data_path", "output", "processes", "opts"}
    if missing or unknown:
        what = f"no {min(missing)}" if missing else f"unknown key {min(unknown)}"
        raise UserError(
            f"{path}: {what}; a study has cfg, data_path, output, seeds, settings, "
            "and may have processes and opts"
        )
    for name in ("cfg", "data_path", "output"):
        if not isinstance(content[name], str):
            raise UserError(f"{path}: {name} must be a path, got {content[name]!r}")
    as_mapping(path, "opts", content.get("opts", {}))
    if not settings:
        raise UserError(f"{path}: settings has none, and a study needs at least one")
    if len({folder_name(name) for name in settings}) < len(settings):
        raise UserError(f"{path}: two settings have names that differ in signs alone")
    processes = content.get("processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise UserError(f"{path}: processes must be a number from 1, got {processes!r}")
    study = Study(settings=settings, seeds=seeds, **content)
    for keys in settings.values():
        if own := OWN & set(study.opts | keys):
            raise UserError(f"{path}: {min(own)} is set by the study: see output, seeds, settings")
        load_config(study.cfg, flat(study.opts | keys))  # a mistake shows now, not at night
    return study


def as_mapping(path: str, name: str, value: Any) -> Mapping[Any, Any]:
    """``value``, if it is a mapping."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {name} must be a mapping, got {value!r}")
    return value


def seed_list(path: str, value: Any) -> list[int]:
    """``seeds`` of a file: a list, or how many, from 0."""
    if isinstance(value, int) and value > 0:
        return list(range(value))
    if isinstance(value, list) and value and all(isinstance(seed, int) for seed in value):
        return value
    raise UserError(f"{path}: seeds must be a number of seeds or a list of them, got {value!r}")


def read_part(text: str) -> tuple[int, int]:
    """``I/N`` -> I, N.

    Raises:
        UserError: something else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part must be I/N with I from 1 to N, got {text!r}")
    return part, parts


def list_jobs(study: Study) -> list[Job]:
    """All runs, seed by seed, so that a study that is stopped has whole comparisons."""
    jobs = []
    for seed in sorted({seed for seeds in study.seeds.values() for seed in seeds}):
        for setting, keys in study.settings.items():
            if seed in study.seeds[setting]:
                name = folder_name(setting)
                opts = study.opts | keys | {"SEED": seed, "MODEL.NAME": name}
                folder = Path(study.output, name, f"seed{seed}")
                made = json.loads(to_json(load_config(study.cfg, flat(opts))))
                made |= {"data_path": study.data_path, "processes": study.processes}
                jobs.append(Job(setting, seed, opts, folder, made))
    return jobs


def folder_name(setting: str) -> str:
    """The folder of the runs of a setting."""
    return re.sub(r"\W+", "_", setting)


def finished(job: Job) -> bool:
    """Whether a run has been judged already.

    Raises:
        UserError: its folder holds a run with other settings.
    """
    path = job.folder / SETTINGS
    if path.exists() and read_json(path) != job.made:
        raise UserError(f"{job.folder}: a run with other settings is there: choose another output")
    return figure(job) is not None


def flat(opts: Mapping[str, Any]) -> list[str]:
    """Keys and values as ``--opts`` takes them."""
    return [str(part) for pair in opts.items() for part in pair]


def figure(job: Job) -> float | None:
    """The k-NN accuracy of a run in per cent, None if it has none."""
    if not job.results().exists():
        return None
    found = read_json(job.results()).get("knn", {}).get(str(NEIGHBOURS))
    return float(found["top1"]) if found else None  # of other numbers of neighbours


def table(jobs: list[Job]) -> list[list[str]]:
    """A row for each setting: mean, standard error, difference to the first setting, each seed.

    The difference is of the same seeds, which share weights at the start and the order of images;
    its standard error is that of the differences.
    """
    found: dict[str, dict[int, float | None]] = {}
    for job in jobs:
        found.setdefault(job.setting, {})[job.seed] = figure(job)
    first = next(iter(found))
    seeds = sorted({job.seed for job in jobs})
    head = ["setting", "runs", f"{NEIGHBOURS}-NN (%)", f"difference to {first}"]
    rows = [[*head, *(f"seed {seed}" for seed in seeds)]]
    for setting, by_seed in found.items():
        known = {seed: value for seed, value in by_seed.items() if value is not None}
        apart = [
            value - base
            for seed, value in known.items()
            if (base := found[first].get(seed)) is not None
        ]
        cells = ["not run" if by_seed.get(seed) is None else f"{known[seed]:.1f}" for seed in seeds]
        cells = [c if seed in by_seed else "" for c, seed in zip(cells, seeds, strict=True)]
        difference = "" if setting == first else mean_and_error(apart, "+.1f")
        row = [setting, str(len(known)), mean_and_error(list(known.values())), difference]
        rows.append([*row, *cells])
    return rows


def mean_and_error(values: list[float], form: str = ".1f") -> str:
    """Mean, and its standard error where there are several values."""
    if not values:
        return "not run"
    mean = format(statistics.fmean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def draw(jobs: list[Job], path: str) -> None:
    """Draw the curves of each setting's first seed, as ``tools.plot_run`` draws them."""
    runs: dict[str, Any] = {}
    for job in jobs:
        if job.setting not in runs and job.results().exists():
            runs[job.setting] = plot_run.read_metrics(str(job.folder))
    if runs:
        plot_run.draw(runs).savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main)
