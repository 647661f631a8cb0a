"""A study: which runs it has, what it makes of their figures, and that it goes on."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TINY, run_tool, wait_for
from scipy import stats

from tools import study
from utils.errors import UserError

SETTINGS = {"moby": {"MODEL.TYPE": "moby"}, "synco": {}, "no noise": {"MODEL.N4": 0, "seeds": [1]}}


def write(folder, **changes):
    content = {
        "cfg": str(ROOT / "configs/synco_vit_tiny.yaml"),
        "data_path": str(folder / "data"),
        "output": str(folder / "out"),
        "seeds": 2,
        "settings": SETTINGS,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def judge(job, top1):
    """The figures and curves of a finished run."""
    job.results().parent.mkdir(parents=True)
    job.results().write_text(json.dumps({"knn": {"20": {"top1": top1, "top5": 100.0}}}))
    (job.folder / "metrics.jsonl").write_text('{"kind": "train", "epochs": 1, "loss": 2.0}\n')


def test_table_has_means_errors_and_differences_of_the_same_seeds(monkeypatch, capsys, tmp_path):
    path = write(tmp_path)
    jobs = study.list_jobs(study.read_study(str(path)))
    assert [(job.setting, job.seed) for job in jobs] == [
        ("moby", 0),
        ("synco", 0),
        ("moby", 1),
        ("synco", 1),
        ("no noise", 1),
    ]
    for job, top1 in zip(jobs, (20.0, 23.0, 30.0, 31.0, None), strict=True):
        if top1:
            judge(job, top1)
    run_tool(monkeypatch, study, path, "--table")
    # moby: deviation of 20 and 30 is 7.07, its error 5; of the differences 3 and 1 it is 1, and
    # Student's t with one degree of freedom is 12.706 at 95%
    table = (tmp_path / "out/small.csv").read_text().splitlines()
    assert table == [
        "setting,runs,20-NN (%),difference to moby,95% interval,p (Holm),found at 80% power,"
        "p of 0.5 or more (Holm),seed 0,seed 1",
        "moby,2,25.0 ± 5.0,,,,,,20.0,30.0",
        "synco,2,27.0 ± 4.0,+2.0 ± 1.0,-10.71 to +14.71,0.3,16.33,0.81,23.0,31.0",
        "no noise,0,not run,not run,,,,,,not run",
    ]
    assert "| synco | 2 | 27.0 ± 4.0 |" in (tmp_path / "out/small.md").read_text()
    assert (tmp_path / "out/small.png").stat().st_size > 1000
    assert "not run" in capsys.readouterr().out


def test_intervals_p_and_power_are_students():
    """Against sleep data of Student (1908), whose figures are in every textbook, and by hand."""
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = study.paired(sleep, 3.0)
    assert found.mean == pytest.approx(1.58)
    assert found.interval == pytest.approx((0.7001142, 2.4598858))
    assert found.p == pytest.approx(0.00283289)
    # t of 1.58 - 3 in standard errors of 0.389
    assert found.p_apart == pytest.approx(stats.t.cdf((1.58 - 3) / stats.sem(sleep), 9))
    # R: power.t.test(n=10, sd=1.230, power=.8, type="one.sample") gives delta 1.22
    assert found.found == pytest.approx(1.2257, abs=0.02)
    power = stats.nct.sf(stats.t.isf(0.025, 9), 9, found.found / stats.sem(sleep))
    assert power == pytest.approx(0.8)


def test_holms_correction():
    """By hand: the smallest of four times 4, the next times 3, and none below one before."""
    corrected = study.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study.holm([0.9, 0.6]) == [1.0, 1.0] and study.holm([]) == []


def test_same_differences_are_not_judged(tmp_path):
    jobs = study.list_jobs(study.read_study(str(write(tmp_path))))
    for job in jobs:
        judge(job, 20.0 + (job.setting == "synco"))
    row = study.table(jobs)[2]
    assert row[3:8] == ["+1.0 ± 0.0", "", "", "", ""]


def test_a_key_that_an_update_adds_or_that_says_where_is_no_other_run(tmp_path):
    job = study.list_jobs(study.read_study(str(write(tmp_path))))[1]
    job.folder.mkdir(parents=True)
    older = json.loads(json.dumps(job.made))
    del older["MODEL"]["N4"]  # which is at its default
    older["PRINT_FREQ"] = 3
    (job.folder / study.SETTINGS).write_text(json.dumps(older))
    assert not study.finished(job)
    older["MODEL"]["N5"] += 1
    (job.folder / study.SETTINGS).write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"other settings is there \(MODEL\.N5\)"):
        study.finished(job)


def test_parts_are_all_runs_once(tmp_path):
    jobs = study.list_jobs(study.read_study(str(write(tmp_path))))
    folders = {job.folder for job in jobs}
    assert len(folders) == len(jobs) == 5
    parts = [study.read_part(f"{i}/3") for i in (1, 2, 3)]
    taken = [job.folder for part, of in parts for job in jobs[part - 1 :: of]]
    assert sorted(taken) == sorted(folders)


@pytest.mark.parametrize(
    ("jobs", "processes", "own", "threads"),
    [(2, 1, None, 4), (3, 2, None, 1), (16, 1, None, 1), (2, 1, "3", 3)],
)
def test_runs_share_the_processors(tmp_path, monkeypatch, jobs, processes, own, threads):
    monkeypatch.setattr(study, "processors", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    runs = study.Runs(study.read_study(str(write(tmp_path, processes=processes))), jobs)
    program = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert runs._run([sys.executable, "-c", program], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == f"{threads}\n"


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    path = write(tmp_path)
    job = study.list_jobs(study.read_study(str(path)))[1]
    job.folder.mkdir(parents=True)
    (job.folder / study.SETTINGS).write_text(json.dumps(job.made | {"data_path": "elsewhere"}))
    with pytest.raises(UserError, match="a run with other settings is there"):
        study.finished(job)
    (job.folder / study.SETTINGS).write_text(json.dumps(job.made))
    assert not study.finished(job)
    judge(job, 1.0)
    assert study.finished(job)
    recipe = str(ROOT / "configs/moby_vit_tiny.yaml")
    other = study.list_jobs(study.read_study(str(write(tmp_path, cfg=recipe))))[1]
    with pytest.raises(UserError, match="a run with other settings is there"):
        study.finished(other)
    job.results().write_text(json.dumps({"knn": {"5": {"top1": 1.0}}}))
    assert not study.finished(job)  # it was judged by other numbers of neighbours
    assert study.table([job])[1][1:3] == ["0", "not run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": None}, "cfg must be a path, got None"),
        ({"opts": 3}, "opts must be a mapping, got 3"),
        ({"opts": {"SEED": 7}}, "SEED is set by the study: see output, seeds, settings"),
        ({"settings": {"a": {"MODEL.NAME": "x"}}}, r"MODEL\.NAME is set by the study"),
        ({"seeds": 0}, "seeds must be a number or a list of them: 0"),
        ({"seeds": ["a"]}, "seeds must be"),
        ({"settings": ["moby"]}, "settings must be a mapping"),
        ({"settings": {"moby": 3}}, "settings moby must be a mapping, got 3"),
        ({"settings": {"moby": {"MODEL.TYP": "moby"}}}, r"MODEL\.TYP"),
        ({"settings": {}}, "settings has none"),
        ({"epochs": 3}, "unknown key epochs"),
        ({"settings": {"a b": {}, "a-b": {}}}, "names that differ in signs alone"),
        ({"processes": 0}, "processes must be"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        study.read_study(str(write(tmp_path, **changes)))


def test_figures_are_of_the_data_set_of_the_run(tmp_path):
    settings = {"own": {}, "other": {"DATA.DATASET": "cifar10"}}
    jobs = study.list_jobs(study.read_study(str(write(tmp_path, seeds=1, settings=settings))))
    assert [job.results().parent.name for job in jobs] == ["knn_imagenet", "knn_cifar10"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_part_that_is_none(text):
    with pytest.raises(UserError, match="--part must be I/N"):
        study.read_part(text)


@pytest.mark.parametrize("name", ["demo", "methods", "kinds", "settings"])
def test_the_shipped_studies_load(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    loaded = study.read_study(f"configs/studies/{name}.yaml")
    assert len(loaded.settings) >= 2 and len(study.list_jobs(loaded)) >= 6


@pytest.mark.slow
def test_a_study_runs_goes_on_and_tells_of_failures(imagenet, tmp_path):
    """Real runs: of two settings one fails; then it is mended, and only its run is made."""
    opts = {**dict(zip(TINY[::2], TINY[1::2], strict=True)), "TRAIN.EPOCHS": 1}
    settings = {"moby": {"MODEL.TYPE": "moby"}, "byol": {"MODEL.TYPE": "byol"}}
    broken = tmp_path / "out" / "byol" / "seed0" / "checkpoint.pth"
    path = write(tmp_path, data_path=str(imagenet), seeds=1, opts=opts, settings=settings)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    command = [sys.executable, "-m", "tools.study", path, "--jobs", "2"]

    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 1 and "Traceback" not in first.stderr
    log = broken.parent / "study.log"
    assert first.stderr.strip().endswith(f"byol, seed 0: failed (see {log})")
    assert "moby, seed 0: " in first.stdout
    made = (tmp_path / "out/moby/seed0/knn_imagenet/results.json").stat().st_mtime_ns

    shutil.rmtree(broken.parent)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "2 runs, 1 of them to do here" in second.stdout
    assert (tmp_path / "out/moby/seed0/knn_imagenet/results.json").stat().st_mtime_ns == made
    rows = (tmp_path / "out/small.csv").read_text().splitlines()
    assert len(rows) == 3 and not any("not run" in row for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_study_which_then_goes_on(imagenet, tmp_path, number):
    """The run under way saves, no other begins, and nothing stays behind."""
    opts = {**dict(zip(TINY[::2], TINY[1::2], strict=True)), "PRINT_FREQ": 1}
    opts |= {"TRAIN.EPOCHS": 400, "TRAIN.SAVE_STEPS": 0}
    settings = {"moby": {"MODEL.TYPE": "moby"}, "byol": {"MODEL.TYPE": "byol"}}
    path = write(tmp_path, data_path=str(imagenet), seeds=1, opts=opts, settings=settings)
    command = [sys.executable, "-m", "tools.study", path]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out/moby/seed0"
    wait_for(lambda: (folder / "metrics.jsonl").exists(), 120)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1, error
    assert "moby, seed 0: stopped, the same command continues it" in error
    assert "the same command goes on with the study" in error
    assert (folder / "checkpoint.pth").exists()
    assert not (tmp_path / "out/byol").exists()
