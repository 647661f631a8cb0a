"""The sheet of training curves: what is drawn, and files that cannot be."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, arguments, run_tool, write_run
from PIL import Image

import main_pretrain
from tools import plot_run
from utils.config import load_config, to_json
from utils.errors import UserError


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_lines_are_the_figures_of_the_file(tmp_path):
    write_run(tmp_path / "a")
    figure = plot_run.draw({"a": plot_run.read_metrics(str(tmp_path / "a"))})
    assert titles(figure) == [
        *("Loss", "k-NN accuracy of the val images", "Similarity", "Learning rate")
    ]
    assert all(axes.get_xlabel() == "epochs" and axes.get_ylabel() for axes in figure.axes)
    raw, smoothed = figure.axes[0].lines
    epochs = np.arange(1, 201) / 50
    expected = 5 / np.arange(1, 201) + 0.1 * (-1.0) ** np.arange(1, 201)
    np.testing.assert_allclose(raw.get_xdata(), epochs)
    np.testing.assert_allclose(raw.get_ydata(), expected)
    window = smoothed.get_ydata()
    assert window[100] == pytest.approx(expected[98:103].mean())
    assert np.abs(np.diff(window[50:150])).max() < 0.05 < np.abs(np.diff(expected[50:150])).max()
    (knn,) = figure.axes[1].lines
    np.testing.assert_allclose(knn.get_xydata(), [(1, 10), (2, 20), (3, 30), (4, 40)])


def test_several_runs_differ_in_colour_and_name(tmp_path):
    folders = [tmp_path / x / "default" for x in ("moby", "synco")]
    for i, folder in enumerate(folders):
        write_run(folder, epochs=2 + i, negative=-0.1 * i)
    names = plot_run.run_names([str(f) for f in folders])
    assert names == ["moby/default", "synco/default"]
    assert plot_run.run_names([str(folders[0])]) == ["moby/default"]
    runs = {n: plot_run.read_metrics(str(f)) for n, f in zip(names, folders, strict=True)}
    figure = plot_run.draw(runs)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == 2
    last = {line.get_color(): line.get_xdata()[-1] for line in figure.axes[0].lines}
    assert last == {colours[0]: 2, colours[1]: 3}
    styles = {(line.get_label(), line.get_linestyle()) for line in figure.axes[2].lines}
    assert styles == {("positive", "-"), ("negative", "--")}


def test_events_are_marked_on_the_loss(tmp_path):
    """Skipped updates, a new start, and the epochs with synthetic negatives."""
    write_run(tmp_path / "a", epochs=4, steps=10)
    log = tmp_path / "a/metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["skipped"] = 2 if line["epochs"] == 1.5 else 0
    lines.insert(20, {"kind": "start", "epoch": 2, "step": 20, "epochs": 2.0})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opts = ["MODEL.TYPE", "synco", "TRAIN.EPOCHS", "4", "MODEL.WARMUP_EPOCHS", "1"]
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), opts)
    (tmp_path / "a/config.json").write_text(to_json(config))
    assert plot_run.synthetic_epochs(str(tmp_path / "a")) == (1, 4)
    figure = plot_run.draw({"a": plot_run.read_metrics(str(tmp_path / "a"))}, {"a": (1, 4)})
    loss, *others = figure.axes
    marks = [line for line in loss.lines if line.get_label() == "skipped updates"]
    assert [list(line.get_xdata()) for line in marks] == [[1.5]]
    assert [list(line.get_xdata()) for line in loss.lines if line.get_linestyle() == ":"] == [
        [2, 2]
    ]
    (band,) = loss.patches
    assert (band.get_x(), band.get_width()) == (1, 3)
    assert not any(axes.patches for axes in others)


@pytest.mark.parametrize(
    "opts",
    [("MODEL.TYPE", "moby"), [f"MODEL.N{i}" if j else "0" for i in range(1, 7) for j in (1, 0)]],
)
def test_without_synthetic_negatives_there_is_no_band(tmp_path, opts):
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), list(opts))
    (tmp_path / "config.json").write_text(to_json(config))
    assert plot_run.synthetic_epochs(str(tmp_path)) is None
    assert plot_run.synthetic_epochs(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("ending", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("jpg", b"\xff\xd8")]
)
def test_the_ending_says_the_format(monkeypatch, tmp_path, ending, begins):
    write_run(tmp_path / "a")
    run_tool(monkeypatch, plot_run, tmp_path / "a", "--out", tmp_path / f"run.{ending}")
    assert (tmp_path / f"run.{ending}").read_bytes().startswith(begins)
    with pytest.raises(UserError, match=r"run\.txt: cannot write the picture \(Format 'txt'"):
        run_tool(monkeypatch, plot_run, tmp_path / "a", "--out", tmp_path / "run.txt")


def test_null_is_a_gap_and_counts_in_no_mean():
    values = np.ones(200)
    values[50:60] = math.nan
    curve = plot_run.smooth(values)
    assert np.isnan(curve[50:60]).all() and (curve[~np.isnan(values)] == 1).all()


def test_a_run_of_the_program_is_drawn(run_main, imagenet, tmp_path, monkeypatch, capsys):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.KNN_FREQ", "1", "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, *opts)
    folder, out = tmp_path / "run/default", tmp_path / "deep/run.png"
    drawn = {name for panel in plot_run.PANELS for name in panel.names}
    assert set(plot_run.read_metrics(str(folder))) >= drawn - {
        "value",
        "probe",
    }  # of evaluations; not asked for
    run_tool(monkeypatch, plot_run, folder, "--out", out)
    assert f"{out} written" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert len(image.convert("RGB").resize((200, 200)).getcolors(40_000)) > 20


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write_run(tmp_path / "a")
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert len(plot_run.read_metrics(str(tmp_path / "a"))["loss"][0]) == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl: no such file"),
        (b"", r"metrics\.jsonl: no figures yet"),
        (b'{"kind": "train", "epochs": 1}\n', "no figures yet"),
        (b'{"kind": "train", "epochs": 1, "loss": 1}\n{"ki\n', r"line 2: damaged"),
        (b'{"kind": "train", "loss": 1}\n', r"line 1: damaged"),
        (b'{"epochs": 1, "loss": "low"}\n', r"line 1: damaged"),
        (b'{"epochs": 1, "loss": [1]}\n', r"line 1: damaged"),
        (b"[1, 2]\n", r"line 1: damaged"),
        (b"\xff\xfe\x00\n", r"line 1: damaged"),
        (b"[" * 100_000 + b"\n", r"line 1: damaged"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    out = tmp_path / "out.png"
    with pytest.raises(UserError, match=message):
        run_tool(monkeypatch, plot_run, tmp_path, "--out", out)
    assert not out.exists()


def test_other_mistakes_are_named(tmp_path, monkeypatch):
    write_run(tmp_path / "a")
    with pytest.raises(UserError, match="given twice"):
        run_tool(monkeypatch, plot_run, tmp_path / "a", tmp_path / "b/../a")
    with pytest.raises(UserError, match="8 runs: at most 7"):
        run_tool(monkeypatch, plot_run, *[tmp_path / str(i) for i in range(8)])
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UserError, match="cannot write the picture"):
        run_tool(monkeypatch, plot_run, tmp_path / "a", "--out", tmp_path / "taken.png")


def test_the_script_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "tools.plot_run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("plot_run.py: error: ") and done.stderr.count("\n") == 1
