"""Losses and gradients that are not finite, collapse, and the figures that tell of them."""

import json
import logging
import math

import pytest
import torch
from helpers import arguments, build_update, spawn, tiny, weights

import main_pretrain
from models import METHODS
from models.momentum import MomentumMethod, spread_figures
from utils.distributed import rank
from utils.errors import UserError
from utils.training_log import MetricsFile, collapsed, queue_spread
from utils.update import Averages, Precision, Update

VIEWS = (2, 4, 32, 32, 3)


def everything(model, optimizer) -> list[torch.Tensor]:
    """Copies of weights, buffers and the optimizer's state."""
    tensors = list(model.state_dict().values())
    for values in optimizer.state.values():
        tensors += [v for v in values.values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in tensors]


def poison(model, kind: str) -> None:
    """Let the next forward pass go wrong."""
    loss = model.loss

    def wrong(*given):
        output = loss(*given)
        value = {"nan loss": math.nan, "infinite loss": math.inf}.get(kind)
        if value is not None:
            output.loss = output.loss + value  # its gradient alone would be finite
        if kind == "infinite gradient":
            output.loss = output.loss * 1e38 * 1e38
        output.keys = tuple(k * math.nan for k in output.keys)
        model.loss = loss
        return output

    model.loss = wrong


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "infinite gradient"])
def test_a_bad_update_leaves_no_trace(process_group, kind, optimizer_name):
    """In weights, queues, BatchNorm and the optimizer; those before and after are made."""
    opts = ("TRAIN.OPTIMIZER.NAME", optimizer_name, "TRAIN.BASE_LR", "0.01")
    config, run = tiny("configs/demo.yaml", *opts)
    torch.manual_seed(0)
    model, optimizer, update = build_update(config, run)
    batch = [torch.randint(0, 256, VIEWS, dtype=torch.uint8)]
    for bad in (True, False, True, True, False):
        before = everything(model, optimizer)
        if bad:
            poison(model, kind)
        finite = update(batch).finite
        after = everything(model, optimizer)
        assert bool(finite) != bad
        assert all(t.isfinite().all() for t in after)
        if bad:
            # the first update makes the optimizer's state, of zeros
            assert all(not t.any() for t in after[len(before) :])
            assert all(a.equal(b) for a, b in zip(after, before, strict=False))
        else:
            assert not all(a.equal(b) for a, b in zip(after, before, strict=False))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("made_before", [0, 1])
def test_a_skipped_update_moves_the_key_encoder_alone(
    process_group, method, parts, half, made_before
):
    """As main_pretrain.py makes it: its momentum moves it towards weights that stay."""
    opts = ("MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8", "MODEL.WARMUP_EPOCHS", "0")
    config, run = tiny(f"configs/{method}_vit_tiny.yaml", *opts, "TRAIN.BASE_LR", "0.01")
    if half:
        run.precision = Precision("float16", run.device)
        run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.manual_seed(0)
    model, optimizer, update = build_update(config, run)
    batch = [torch.randint(0, 256, VIEWS, dtype=torch.uint8) for _ in range(parts)]
    for _ in range(made_before):
        assert update(batch).finite
    state, kept = model.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    settings = {p: {n: v.clone() for n, v in s.items()} for p, s in optimizer.state.items()}
    poison(model, "nan loss")
    model.update_key_encoder(0.9)
    assert not update(batch).finite
    follows = {n for n, _ in model.named_parameters() if n.startswith(("encoder_k", "projector_k"))}
    assert len(follows) > 10
    for name, before in kept.items():
        if name in follows:
            before = before.lerp(kept[name.replace("_k.", ".", 1)], 1 - 0.9)
        assert state[name].equal(before), name
    moved = {name for name in follows if not state[name].equal(kept[name])}
    assert bool(moved) == bool(made_before)  # before the first update both are the same
    for parameter, values in optimizer.state.items():  # torch makes it of zeros at the first
        for name, value in values.items():
            own = settings.get(parameter, {}).get(name, torch.zeros_like(value))
            assert value.equal(own), name
    assert run.precision.scaler.get_scale() == (4.0 if half else 1.0)  # which halves, as it should


def one_of_two(_, folder: str) -> None:
    config, run = tiny("configs/demo.yaml")
    torch.manual_seed(0)
    model, optimizer, update = build_update(config, run)
    batch = [torch.randint(0, 256, VIEWS, dtype=torch.uint8)]
    made = []
    for number in range(4):
        if number == 2 and rank() == 1:
            poison(model, "infinite loss")
        made.append(bool(update(batch).finite))
    torch.save((made, everything(model, optimizer)), f"{folder}/{rank()}.pth")


@pytest.mark.slow
def test_a_bad_loss_of_one_process_skips_on_all(tmp_path):
    spawn(one_of_two, 2, str(tmp_path))
    (made, state), (made1, state1) = (torch.load(tmp_path / f"{r}.pth") for r in (0, 1))
    assert made == made1 == [True, True, False, True]
    assert all(a.isfinite().all() and a.equal(b) for a, b in zip(state, state1, strict=True))


def test_a_row_of_bad_updates_stops_the_run(run_main, imagenet, tmp_path, monkeypatch):
    """One alone does not; the last good checkpoint is named and stays."""
    make, count = Update.__call__, [0]

    def sometimes(self, *rest):
        count[0] += 1
        if count[0] in (2, 3, 5) or count[0] > 8:
            poison(self.ddp.module, "nan loss")
        return make(self, *rest)

    monkeypatch.setattr(Update, "__call__", sometimes)
    opts = ("TRAIN.MAX_SKIPPED_UPDATES", "3", "TRAIN.EPOCHS", "4", "PRINT_FREQ", "2")
    with pytest.raises(UserError, match=r"4 updates in a row .*default/checkpoint\.pth$"):
        run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, *opts))
    state = weights(tmp_path)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    folder = tmp_path / "run/default"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if line["kind"] == "train"]
    assert skipped == [1, 1, 1, 0, 2, 2]
    assert lines[-1]["loss"] is None and lines[0]["loss"] > 0
    assert (
        "updates skipped, as loss or gradient was not finite: 2"
        in (folder / "log_rank0.txt").read_text()
    )


def test_the_longest_row_is_counted(process_group):
    config, run = tiny("configs/demo.yaml")
    model, _, update = build_update(config, run)
    counted = update.__closure__
    batch = [torch.randint(0, 256, VIEWS, dtype=torch.uint8)]
    (own,) = [c.cell_contents for c in counted if isinstance(c.cell_contents, Update)]
    for made in (True, False, False, True, False, False, False, True, False):
        if not made:
            poison(model, "nan loss")
        update(batch)
    assert own.check_skipped(4, "") == [False]
    with pytest.raises(UserError, match=r"^3 updates in a row .* \(at most .* 3\): do this$"):
        own.check_skipped(3, "do this")


def test_similarities_are_those_of_all_pairs():
    torch.manual_seed(0)
    q1, q2, k1, k2 = torch.nn.functional.normalize(torch.randn(4, 6, 5), dim=2)
    queues = torch.nn.functional.normalize(torch.randn(2, 5, 9), dim=1).unbind()
    figures = spread_figures((q1, q2), (k1, k2), queues)
    expected = ((q1 @ queues[1]).mean() + (q2 @ queues[0]).mean()) / 2
    torch.testing.assert_close(figures["negative"], expected)
    expected = (q1.std(0).mean() + q2.std(0).mean()) / 2
    torch.testing.assert_close(figures["feature_std"], expected)
    assert queue_spread(queues) == pytest.approx(float(sum(q.std(1).mean() for q in queues) / 2))

    figures = spread_figures((q1, q2), (k1, k2), ())
    others = ~torch.eye(6, dtype=torch.bool)
    expected = ((q1 @ k2.T)[others].mean() + (q2 @ k1.T)[others].mean()) / 2
    torch.testing.assert_close(figures["negative"], expected)
    alone = spread_figures((q1[:1], q2[:1]), (k1[:1], k2[:1]), ())
    assert alone == {}  # one image differs from no other


def test_even_features_have_not_collapsed():
    torch.manual_seed(0)
    even = torch.nn.functional.normalize(torch.randn(64, 256), dim=1)
    std = float(spread_figures((even,), (even,), ())["feature_std"])
    assert std == pytest.approx(256**-0.5, rel=0.05)
    assert not collapsed(std, 256) and collapsed(0.05 * std, 256)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_collapsed_run_is_flagged(run_main, imagenet, tmp_path, monkeypatch, method):
    """And a healthy one is not."""
    opts = ("TRAIN.EPOCHS", "1", "DATA.NUM_WORKERS", "0")
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path / "healthy", *opts))
    assert "WARNING collapsed" not in (tmp_path / "healthy/run/default/log_rank0.txt").read_text()
    forward = MomentumMethod.forward

    def same_for_all(self, view1, view2, epoch):
        """All images are the first one."""
        return forward(self, *(v[:1].expand_as(v) for v in (view1, view2)), epoch)

    monkeypatch.setattr(MomentumMethod, "forward", same_for_all)
    given = arguments(method, imagenet, tmp_path / "collapsed", *opts)
    run_main(main_pretrain, *given, "MODEL.ONLINE_DROP_PATH_RATE", "0")
    log = (tmp_path / "collapsed/run/default/log_rank0.txt").read_text()
    assert log.count("WARNING collapsed: ") == 1


def test_means_leave_out_what_was_skipped(process_group):
    averages = Averages()
    for value, finite in ((1.0, True), (math.nan, False), (4.0, True)):
        averages.add({"loss": torch.tensor(value)}, torch.tensor(finite))
    assert averages.updates == 3
    assert averages.read() == {"loss": 2.5, "skipped": 1}
    averages.add({"loss": torch.tensor(math.inf)}, torch.tensor(False))
    means = averages.read()
    assert math.isnan(means["loss"]) and means["skipped"] == 1


def test_a_metrics_file_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    logger = logging.getLogger("metrics")
    (tmp_path / "metrics.jsonl").mkdir()
    metrics = MetricsFile(str(tmp_path), None, logger)
    metrics.write("train", {"step": 1})
    metrics.write("train", {"step": 2})
    assert caplog.text.count("cannot write") == 1


def test_figures_in_the_file_are_complete(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    lines = (tmp_path / "run/default/metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[:-1]):
        assert set(line) == {
            *("kind", "epoch", "step", "epochs", "lr", "momentum", "loss", "accuracy", "positive"),
            *("negative", "feature_std", "queue_spread", "skipped", "seconds", "images_per_s"),
            *("memory_mb", "eta_s", "grad_norm", "grad_norm_encoder", "grad_norm_projector"),
            "grad_norm_predictor",
        }
        assert line["kind"] == "train" and all(v is not None for v in line.values())
    last = json.loads(lines[-1])
    assert (last["kind"], last["epoch"], last["step"]) == ("epoch", 0, 6) and last["seconds"] > 0
