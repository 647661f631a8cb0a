"""The table of several runs: what differs, the figures, and the marks."""

import csv
import json

import pytest
from helpers import ROOT, arguments, run_tool

import eval_knn
import main_pretrain
from tools import compare
from utils.errors import UserError


def write(folder, name, results, digest="d1", config=None, **provenance):
    """A run folder with an evaluation."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    entry = {"data": {"digest": digest, "images": {"test": 5}}, **provenance}
    text = json.dumps(results | {"provenance": entry})
    (folder / name / "results.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config or {"SEED": 0, "OUTPUT": str(folder)}))
    return folder


def knn(top1, temperature=0.07):
    return {"dataset": "imagenet", "temperature": temperature, "knn": {"20": {"top1": top1}}}


def test_what_differs_and_the_figures(monkeypatch, capsys, tmp_path):
    train = {"OUTPUT": "x", "MODEL": {"TYPE": "moby", "N1": 3}, "SEED": 0}
    other = {"OUTPUT": "y", "MODEL": {"TYPE": "synco", "N1": 3}, "SEED": 0}
    one = write(tmp_path / "m/one", "knn_imagenet", knn(51.25), config=train, epoch=3)
    two = write(tmp_path / "m/two", "knn_imagenet", knn(52.5), config=other, epoch=3)
    run_tool(monkeypatch, compare, one, two)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["m/one", "m/two"],
        ["configuration", "MODEL.TYPE", "moby", "synco"],
        ["results", "knn_imagenet", "knn.20.top1", "51.25", "52.5"],
    ]


def test_other_data_and_other_protocols_are_marked(monkeypatch, capsys, tmp_path):
    runs = [
        write(tmp_path / "a/first", "knn_imagenet", knn(1.0)),
        write(tmp_path / "a/same", "knn_imagenet", knn(2.0)),
        write(tmp_path / "a/data", "knn_imagenet", knn(3.0), digest="d2"),
        write(tmp_path / "a/unknown", "knn_imagenet", knn(4.0), digest=None),
        write(tmp_path / "a/protocol", "knn_imagenet", knn(5.0, 0.1)),
        write(tmp_path / "a/both", "knn_imagenet", knn(1e6, 0.1), digest="d2"),
        write(tmp_path / "a/none", "retrieval_roxford5k", {"mAP": {"hard": None}}),
    ]
    written = [tmp_path / "new/t.csv", tmp_path / "new/t.md"]
    flags = ("--csv", written[0], "--markdown", written[1])
    run_tool(monkeypatch, compare, *runs, *flags)
    printed = capsys.readouterr().out
    table = {tuple(row[:2]): row[2:] for row in csv.reader(written[0].read_text().splitlines())}
    assert table["results", "knn_imagenet knn.20.top1"] == [
        *("1", "2", "3 *", "4 *", "5 +", "1e+06 *+", "-")
    ]
    assert table["results", "retrieval_roxford5k mAP.hard"] == ["-"] * 6 + ["None"]
    assert table["protocol", "knn_imagenet temperature"] == [*["0.07"] * 4, "0.1", "0.1", "-"]
    assert "\n* on other images" in printed and "\n+ measured in another way" in printed
    text = written[1].read_text()
    assert "| results | knn_imagenet knn.20.top1 | 1 | 2 | 3 \\* |" in text
    assert "- `+` measured in another way" in text and text.splitlines()[1].startswith("| --- |")
    run_tool(monkeypatch, compare, *runs[:2])
    assert "first run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TEST.CROP", False),
        ("DATA.INTERPOLATION", "bilinear"),
        ("DATA.IMG_SIZE", 96),
        ("AMP_OPT_LEVEL", "bfloat16"),
        ("DATA.BATCH_SIZE", 128),
        ("--imsize", 500),
    ],
)
def test_what_figures_depend_on_is_marked_where_it_differs(
    monkeypatch, capsys, tmp_path, name, value
):
    same = {"TEST.CROP": True, "DATA.INTERPOLATION": "bicubic", "DATA.IMG_SIZE": 224}
    same |= {"AMP_OPT_LEVEL": "O0", "DATA.BATCH_SIZE": 64, "--imsize": 224, "weights": "a"}
    runs = [
        write(tmp_path / "a/first", "knn_imagenet", knn(1.0), identity=same),
        write(tmp_path / "a/other", "knn_imagenet", knn(2.0), identity=same | {name: value}),
        write(tmp_path / "a/weights", "knn_imagenet", knn(3.0), identity=same | {"weights": "b"}),
        write(tmp_path / "a/older", "knn_imagenet", knn(4.0)),
    ]
    run_tool(monkeypatch, compare, *runs)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["results", "knn_imagenet", "knn.20.top1", "1", "2", "+", "3", "4"] in lines
    assert any(line[:3] == ["protocol", "knn_imagenet", name] for line in lines)


def test_keys_of_place_are_not_shown_and_missing_ones_have_their_default(
    monkeypatch, capsys, tmp_path
):
    configs = [{"SEED": 0, "TAG": "a", "PRINT_FREQ": 5}, {"SEED": 1, "TAG": "b"}]
    runs = [
        write(tmp_path / f"a/{number}", "knn_imagenet", knn(1.0), config=config)
        for number, config in enumerate(configs)
    ]
    run_tool(monkeypatch, compare, *runs)
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("configuration")]
    assert shown == ["SEED"]


def test_what_chose_is_protocol(monkeypatch, capsys, tmp_path):
    def probe(chosen):
        return {"best": {"value": 70.0, "selected_on": chosen}, "last": {"top1": 69.0}}

    runs = [
        write(tmp_path / f"a/{on}", "linear_imagenet_linprob", probe(on))
        for on in ("test", "train")
    ]
    run_tool(monkeypatch, compare, *runs)
    printed = capsys.readouterr().out
    assert "70 +" in printed and "best.selected_on  test" in printed


def test_results_of_v0_1_and_single_files(monkeypatch, capsys, tmp_path):
    old = tmp_path / "old/knn_imagenet"
    old.mkdir(parents=True)
    (old / "results.json").write_text(json.dumps(knn(1.0)))
    new = write(tmp_path / "new", "knn_imagenet", knn(2.0))
    run_tool(monkeypatch, compare, new, old / "results.json", new)
    line = capsys.readouterr().out.splitlines()[-2]  # before what the mark means
    assert line.split() == ["results", "knn_imagenet", "knn.20.top1", "2", "1", "*"]


def test_mistakes(monkeypatch, tmp_path):
    for content, message in ((None, "no such file"), ("[1]", "not the JSON"), ("{", "not JSON")):
        path = tmp_path / "results.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            run_tool(monkeypatch, compare, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a results\.json nor a folder"):
        run_tool(monkeypatch, compare, tmp_path / "empty")
    run = write(tmp_path / "run", "knn_imagenet", knn(1.0))
    with pytest.raises(UserError, match="cannot write the table"):
        run_tool(monkeypatch, compare, run, "--csv", tmp_path / "run")


@pytest.mark.slow
def test_real_runs(run_main, monkeypatch, capsys, imagenet, tmp_path):
    folders = []
    for method in ("moby", "byol"):
        given = arguments(method, imagenet, tmp_path / method, "TRAIN.EPOCHS", "1")
        run_main(main_pretrain, *given)
        run_main(eval_knn, *given[:6], "--nb-knn", "5", *given[6:])
        folders.append(tmp_path / method / "run/default")
    run_tool(monkeypatch, compare, *folders)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["configuration", "MODEL.TYPE", "moby", "byol"] in lines
    assert ["provenance", "knn_imagenet", "method", "moby", "byol"] in lines
    figures = next(line for line in lines if "knn.5.top1" in line)
    assert len(figures) == 5  # no mark
    assert str(ROOT) not in str(lines)
