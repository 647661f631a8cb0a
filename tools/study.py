"""Compare settings over several seeds: train and judge every run, then one table.

FILE is YAML, see docs/studies.md. The same command continues a study that was stopped: runs that
are finished stay, and one that was stopped goes on from its checkpoint.

    python -m tools.study FILE [--jobs N] [--part I/N] [--table]
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import optimize, stats

from evaluation.pictures import save
from tools import plot_run
from tools.compare import as_csv, as_markdown, read_json
from utils.arguments import command_parser, number_in
from utils.config import FEATURE, NETWORK, TRAINING, load_config, settings, to_json
from utils.distributed import processors
from utils.errors import UserError, reading
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
        margin: points of accuracy within which two settings count as equivalent.
    """

    cfg: str
    data_path: str
    output: str
    settings: dict[str, dict[str, Any]]
    seeds: dict[str, list[int]]
    processes: int = 1
    opts: dict[str, Any] = field(default_factory=dict)
    margin: float = 0.5


@dataclass(frozen=True)
class Job:
    """A run of a study: a setting with a seed.

    Attributes:
        setting: its name.
        seed: of the run.
        opts: all keys that differ from the recipe.
        folder: the run folder.
        made: what it is made of: the configuration, the data path, the processes.
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
    parser = command_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="the study, in YAML")
    parser.add_argument(
        "--jobs", type=number_in(1, 1000), default=1, metavar="N", help="runs at a time"
    )
    every = "run only every Nth, as task I of an array of N"
    parser.add_argument("--part", default="1/1", metavar="I/N", help=every)
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
    rows = table(jobs, study.margin)
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

    def check(right: bool, message: str) -> None:
        if not right:
            raise UserError(f"{path}: {message}")

    with reading(path, "not YAML"):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    check(isinstance(content, dict), "not a list of keys and values")
    shared, by_name = content.pop("seeds", None), content.pop("settings", None)
    missing = {"cfg", "data_path", "output"} - set(content)
    unknown = set(content) - {"cfg", "data_path", "output", "processes", "opts", "margin"}
    known = "a study has cfg, data_path, output, seeds, settings, and may have processes, opts and "
    for names, what in ((missing, "no"), (unknown, "unknown key")):
        check(not names, f"{what} {min(names, default='')}; {known}margin")
    for name in ("cfg", "data_path", "output"):
        value = content[name]
        check(isinstance(value, str), f"{name} must be a path, got {value!r}")
    opts, processes, margin = (
        content.get(n, d) for n, d in (("opts", {}), ("processes", 1), ("margin", 1))
    )
    check(isinstance(by_name, Mapping), f"settings must be a mapping, got {by_name!r}")
    check(isinstance(opts, Mapping), f"opts must be a mapping, got {opts!r}")
    check(isinstance(processes, int) and processes > 0, f"processes must be from 1: {processes!r}")
    check(isinstance(margin, int | float) and margin > 0, f"margin must be positive: {margin!r}")
    check(bool(by_name), "settings has none, and a study needs at least one")
    check(
        len({folder_name(str(name)) for name in by_name}) == len(by_name),
        "two settings have names that differ in signs alone",
    )
    changed, seeds = {}, {}
    for name, keys in by_name.items():
        check(isinstance(keys or {}, Mapping), f"settings {name} must be a mapping, got {keys!r}")
        changed[str(name)] = keys = dict(keys or {})
        of_name = keys.pop("seeds", shared)
        several = list(range(of_name)) if isinstance(of_name, int) else of_name
        whole = isinstance(several, list) and all(isinstance(seed, int) for seed in several)
        check(whole and bool(several), f"seeds must be a number or a list of them: {of_name!r}")
        seeds[str(name)] = several
        own = OWN & set(opts | keys)
        check(not own, f"{min(own, default='')} is set by the study: see output, seeds, settings")
        load_config(content["cfg"], flat(opts | keys))  # a mistake shows now, not at night
    return Study(settings=changed, seeds=seeds, **content)


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

    def matters(made: Mapping[str, Any]) -> dict[str, Any]:
        place = {name: made.get(name) for name in ("data_path", "processes")}
        return place | settings(made, NETWORK | TRAINING | FEATURE)

    path = job.folder / SETTINGS
    if path.exists():
        before, now = matters(read_json(path)), matters(job.made)
        if other := [name for name in now if before[name] != now[name]]:
            raise UserError(
                f"{job.folder}: a run with other settings is there ({', '.join(other[:3])}): "
                "choose another output"
            )
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


@dataclass(frozen=True)
class Paired:
    """What the paired differences of n seeds say, by Student's t.

    Attributes:
        mean: of the differences.
        interval: at 95%.
        p: of no difference, two-sided.
        p_apart: of a difference of ``margin`` or more, by two one-sided tests.
        found: the difference that a test at the level of ``alpha`` finds four times out of five.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    p_apart: float
    found: float


def paired(differences: list[float], margin: float, alpha: float = 0.05) -> Paired:
    """Judge at least two differences that are not all the same."""
    n, error = len(differences), stats.sem(differences)
    mean = float(np.mean(differences))
    critical = stats.t.isf(alpha / 2, n - 1)

    def missed(effect: float) -> float:  # above a power of 80%
        return 0.2 - stats.nct.cdf(critical, n - 1, effect / error)

    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return Paired(
        mean,
        stats.t.interval(0.95, n - 1, mean, error),
        float(stats.ttest_1samp(differences, 0).pvalue),
        float(max(above, below)),
        float(optimize.brentq(missed, 0, 20 * critical * error)),
    )


def holm(values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = np.argsort(values)
    larger = np.sort(values) * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(larger), 1)
    return corrected.tolist()


def table(jobs: list[Job], margin: float = 0.5) -> list[list[str]]:
    """A row for each setting: mean, paired difference to the first setting, each seed.

    The difference is of the same seeds, which share weights at the start and the order of images.
    p-values and power are corrected for the number of comparisons.
    """
    found: dict[str, dict[int, float | None]] = {}
    for job in jobs:
        found.setdefault(job.setting, {})[job.seed] = figure(job)
    first = next(iter(found))
    apart = {}
    for setting, by_seed in found.items():
        pairs = [(v, found[first].get(seed)) for seed, v in by_seed.items()]
        apart[setting] = [a - b for a, b in pairs if a is not None and b is not None]
    compared = {s: d for s, d in apart.items() if s != first and len(set(d)) > 1}
    judged = {s: paired(d, margin, 0.05 / len(compared)) for s, d in compared.items()}
    different = dict(zip(judged, holm([of.p for of in judged.values()]), strict=True))
    equal = dict(zip(judged, holm([of.p_apart for of in judged.values()]), strict=True))
    seeds = sorted({job.seed for job in jobs})
    head = ["setting", "runs", f"{NEIGHBOURS}-NN (%)", f"difference to {first}", "95% interval"]
    head += ["p (Holm)", "found at 80% power", f"p of {margin:g} or more (Holm)"]
    rows = [[*head, *(f"seed {seed}" for seed in seeds)]]
    for setting, by_seed in found.items():
        known = [value for value in by_seed.values() if value is not None]
        row = [setting, str(len(known)), mean_and_error(known)]
        row.append("" if setting == first else mean_and_error(apart[setting], "+.1f"))
        if of := judged.get(setting):
            row.append("{:+.2f} to {:+.2f}".format(*of.interval))
            row += [f"{different[setting]:.2g}", f"{of.found:.2f}", f"{equal[setting]:.2g}"]
        else:
            row += [""] * 4
        for seed in seeds:
            value = by_seed.get(seed)
            row.append(
                "" if seed not in by_seed else "not run" if value is None else f"{value:.1f}"
            )
        rows.append(row)
    return rows


def mean_and_error(values: list[float], form: str = ".1f") -> str:
    """Mean, and its standard error where there are several values."""
    if not values:
        return "not run"
    mean = format(np.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {stats.sem(values):.1f}"


def draw(jobs: list[Job], path: str) -> None:
    """Draw the curves of each setting's first seed, as ``tools.plot_run`` draws them."""
    runs: dict[str, Any] = {}
    for job in jobs:
        if job.setting not in runs and job.results().exists():
            runs[job.setting] = plot_run.read_metrics(str(job.folder))
    if runs:
        save(plot_run.draw(runs), path)


if __name__ == "__main__":
    run_script(main)
