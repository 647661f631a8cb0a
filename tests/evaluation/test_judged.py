"""What the heads of a probe have achieved, and what is said of it."""

import logging

import pytest
import torch

import evaluation.judged
from evaluation.judged import TEST, TRAIN, Judged, by_name, describe, last_figures, summary, table
from evaluation.linear import LinearClassifiers, score_heads
from models.encoder import create_encoder
from utils.errors import UserError


def figure(value: float, **more: float) -> dict[str, float]:
    return {"value": value, "top1": value, "top5": None, "loss": 1.0} | more


@pytest.fixture(scope="module")
def model() -> LinearClassifiers:
    torch.manual_seed(0)
    return LinearClassifiers(create_encoder("vit_nano", 32), 3, 2, seed=4, frozen=True)


def test_the_best_head_of_all_epochs_is_kept(model, tmp_path):
    path = tmp_path / "best.pth"
    judged = Judged([0.1, 1.0])
    assert judged.epoch == -1 and judged.left_out == [False, False]
    with pytest.raises(ValueError, match="no epoch was judged"):
        judged.outcome(TEST)
    written = []
    for epoch, values in enumerate([(10, 30), (30, 20), (40, None), (None, 35)]):
        judged.add(epoch, [None if v is None else figure(v) for v in values])
        path.unlink(missing_ok=True)
        judged.save_best(model, str(path))
        written.append(path.exists())
        if path.exists():
            saved = torch.load(path, weights_only=True)
            assert saved["epoch"] == epoch and saved["best"] == judged.best
            assert [k for k in saved["model"] if k.startswith("heads")] == [
                *("heads.0.weight", "heads.0.bias")
            ]
    assert written == [True, False, True, False]  # 30 again is no better
    assert judged.best == {"value": 40, "epoch": 2, "lr": 0.1}
    best, last = judged.outcome(TEST)
    assert best == judged.best | {"selected_on": "test"}
    assert last["value"] is None and (last["epoch"], last["lr"]) == (3, 0.1)  # it has diverged
    again = Judged([0.1, 1.0])
    again.load_state_dict(judged.state_dict() | {"epoch": 7})
    assert vars(again) == vars(judged)
    old = Judged([0.1, 1.0])  # as v0.1 wrote it
    old.load_state_dict({"epoch": 7, "best": judged.best, "figures": judged.figures})
    assert old.epoch == 7 and old.left_out == [False, False]


def test_only_the_first_process_writes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.judged, "rank", lambda: 1)
    judged = Judged([0.1, 1.0])
    judged.add(0, [figure(1), figure(2)])
    judged.save_best(model, str(tmp_path / "best.pth"))
    assert not list(tmp_path.iterdir())


def test_heads_that_diverged_are_left_out_for_good(model):
    judged = Judged([0.1, 1.0])
    judged.leave_out([False, True])
    judged.leave_out([False, False])
    assert judged.left_out == [False, True]
    features, targets = torch.randn(6, 128), torch.arange(6) % 3
    found = score_heads(model, features, targets, "top1", judged.left_out)
    assert found[1] is None and found[0]["loss"] > 0
    assert None not in score_heads(model, features, targets, "top1")
    with pytest.raises(UserError, match=r"diverged with all rates \[0\.1, 1\.0\]"):
        judged.add(0, [None, None])


def test_figures_are_named_by_the_rate():
    found = by_name(["0.1", "3"], [figure(5.0, loss=2.0), None])
    assert found == {
        **{"value@0.1": 5.0, "top1@0.1": 5.0, "top5@0.1": None, "test_loss@0.1": 2.0},
        "value@3": None,
    }
    assert by_name([""], [figure(5.0)])["test_loss"] == 1.0


def test_lines_of_the_log(caplog):
    judged = Judged([0.1, 1.0])
    judged.add(3, [figure(5.0), None])
    with caplog.at_level(logging.INFO):
        judged.log("top1", logging.getLogger("judged"))
    assert [r.getMessage() for r in caplog.records] == [
        "epoch 3, lr 0.1: top1 value 5.0000 top1 5.0000 loss 1.0000",
        "epoch 3, lr 1: top1 diverged",
    ]
    assert describe(None) == "diverged"


def test_held_out_images_choose_and_test_images_tell():
    judged = Judged([0.1, 1.0])
    judged.add(0, [figure(50), figure(90)], [figure(30), figure(20)])
    judged.add(1, [figure(95), figure(60)], [figure(10), figure(40)])
    judged.add(2, [figure(99), figure(55)], [figure(20), figure(40)])
    best, last = judged.outcome(TRAIN)
    chosen = {"epoch": 1, "lr": 1.0, "held_out": 40, "selected_on": "train"}
    assert best == {"value": 60, **chosen}
    assert (last["value"], last["epoch"], last["lr"], last["selected_on"]) == (55, 2, 1.0, "train")
    named = by_name(["0.1", "1"], judged.figures, [figure(20), None])
    assert (named["held_out@0.1"], named["held_out@1"], named["value@1"]) == (20, None, 55)


def test_nothing_chose_the_last_figure_of_a_single_rate():
    judged = Judged([1.0])
    judged.add(0, [figure(60)])
    judged.add(1, [figure(50)])
    best, last = judged.outcome(TEST)
    assert (best["value"], best["selected_on"]) == (60, "test")
    assert (last["value"], last["epoch"], last["selected_on"]) == (50, 1, None)
    assert summary("top1", best, last) == (
        "last: top1 50.0000 on the test images after epoch 1, rate 1; best: top1 60.0000 on the "
        "test images after epoch 0, rate 1 (epoch and rate chosen on the test images)"
    )


def test_the_line_says_what_chose():
    judged = Judged([0.1, 1.0])
    judged.add(0, [figure(60), figure(50)], [figure(1), figure(2)])
    line = summary("mAP", *judged.outcome(TRAIN))
    assert "last: mAP 50.0000 on the test images after epoch 0, rate 1 (rate chosen on " in line
    assert line.endswith("(epoch and rate chosen on held-out training images)")
    chosen = {"epoch": None, "lr": None, "selected_on": TRAIN}
    line = summary("top1", {"value": 3.0, **chosen}, last_figures(None, None, None) | chosen)
    assert line.startswith("last: top1 none on the test images (strength chosen on held-out")


def test_the_table_has_the_last_figures_and_the_best():
    """A probe by L-BFGS has neither epoch nor rate, one head of mAP no top-5."""
    best = {"value": 60.0, "epoch": 3, "lr": 0.1}
    last = last_figures({"value": 50.0, "top5": 90.0, "loss": 1.5}, 9, 0.1)
    assert table("top1", best, last) == [
        ["", "top1 %", "top5 %", "loss", "epoch", "rate"],
        ["last", "50.0000", "90.0000", "1.5000", "9", "0.1"],
        ["best", "60.0000", "-", "-", "3", "0.1"],
    ]
    assert table("mAP", best, last_figures(None, None, None))[1] == ["last"] + ["-"] * 5
