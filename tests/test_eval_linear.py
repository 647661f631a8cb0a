"""eval_linear.py: the probe, fine-tuning, logistic regression, resumption and mistakes."""

import json
import os
import re
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, figures, run_forked, run_tool
from PIL import Image

import eval_linear
from evaluation.protocols import PROBES
from models.encoder import create_encoder
from tools import plot_run
from tools.make_tiny_transfer import write_tiny
from utils import training_log
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.session import Session
from utils.signals import RESUMABLE
from utils.update import Update

TINY = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "0"]
TINY += ["MODEL.ENCODER", "vit_nano", "MODEL.NAME", "run", "PRINT_FREQ", "1"]
TINY += ["AMP_OPT_LEVEL", "O0"]  # on any machine
EPOCHS = ["TRAIN.EPOCHS", "3", "TRAIN.WARMUP_EPOCHS", "1"]
FINETUNE = ["LINEAR_EVAL.WEIGHTS", "finetune"]


def arguments(data, output, *flags, opts=(), random=True):
    weights = ["--random-weights"] if random else []
    return [
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", data, "--output", output),
        *(*weights, *flags, "--opts", *TINY, *EPOCHS, *opts),
    ]


def folder(output, kind="linprob", dataset="imagenet"):
    return output / "run" / "default" / f"linear_{dataset}_{kind}"


def results(output, *where):
    return figures(folder(output, *where) / "results.json")


def checkpoint(output, kind="linprob", name="checkpoint.pth"):
    return torch.load(folder(output, kind) / name, weights_only=True)


def heads(state):
    """The weights of each head."""
    weights = state["model"]
    count = len(state["lr"])
    return [[weights[f"heads.{i}.{n}"] for n in ("weight", "bias")] for i in range(count)]


def encoder_weights(state):
    return {k: v for k, v in state["model"].items() if k.startswith("encoder.")}


def assert_same(one, other):
    assert set(one["model"]) == set(other["model"])
    for name, value in one["model"].items():
        assert value.equal(other["model"][name]), name
    for i, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            same = other["optimizer"]["state"][i][name]
            assert value.equal(same) if torch.is_tensor(value) else value == same
    assert one["best"] == other["best"] and one["figures"] == other["figures"]


@pytest.fixture(scope="module")
def tinted(tmp_path_factory):
    """Four classes of plain colours: 48 images to train on and 48 to test."""
    root = tmp_path_factory.mktemp("tinted")
    rng = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [210, 210, 210]])
    for split in ("train", "val"):
        for label, colour in enumerate(colours):
            path = root / split / f"class{label}"
            path.mkdir(parents=True)
            for i in range(12):
                noise = rng.integers(-30, 30, (36, 40, 3))
                cv2.imwrite(str(path / f"{i}.png"), (colour + noise).astype(np.uint8))
    return root


def test_separable_classes_are_told_apart(run_main, tinted, tmp_path):
    opts = ["TRAIN.EPOCHS", "12"]
    run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "30", opts=opts))
    found = results(tmp_path)
    assert set(found) == {"dataset", "metric", "weights", "best", "last", "protocol"}
    assert (found["dataset"], found["metric"], found["weights"]) == ("imagenet", "top1", "freeze")
    assert found["best"]["value"] == 100 and found["best"]["lr"] == 30
    assert found["last"]["top1"] == found["last"]["top5"] == 100 and found["last"]["loss"] < 0.5
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert re.search(r"^best +100\.0000 +- +- +\d+ +30$", log, re.MULTILINE)
    state = checkpoint(tmp_path)
    assert state["epoch"] == 11
    assert checkpoint(tmp_path, name="best.pth")["epoch"] == found["best"]["epoch"]


def test_labels_that_mean_nothing_are_not_learned(run_main, tinted, tmp_path):
    """Images of all colours in each class: no better than chance on 48 images, 3 sigma."""
    rng = np.random.default_rng(1)
    files = sorted(tinted.glob("*/*/*.png"))
    for split in ("train", "val"):
        own = [path for path in files if path.parts[-3] == split]
        for place, path in zip(own, rng.permutation(len(own)), strict=True):
            target = tmp_path / "data" / place.relative_to(tinted)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(own[path], target)
    run_main(eval_linear, *arguments(tmp_path / "data", tmp_path, "--lr", "30"))
    assert results(tmp_path)["last"]["top1"] <= 100 * (0.25 + 3 * (0.25 * 0.75 / 48) ** 0.5)


@pytest.mark.parametrize("protocol", PROBES)
def test_each_rate_learns_as_if_alone(run_main, tinted, tmp_path, protocol):
    """Bit for bit, next to one that diverges; clipping does not join them either."""
    opts = ["TRAIN.CLIP_GRAD", "0.05", "DATA.BATCH_SIZE", "8"]
    rates = ["0.1", "3", "1e45"]
    flags = ["--protocol", protocol, "--lr"]
    run_main(eval_linear, *arguments(tinted, tmp_path / "all", *flags, *rates, opts=opts))
    together = checkpoint(tmp_path / "all")
    assert together["figures"][2] is None
    for number, rate in enumerate(rates[:2]):
        run_main(eval_linear, *arguments(tinted, tmp_path / rate, *flags, rate, opts=opts))
        alone = checkpoint(tmp_path / rate)
        for one, other in zip(heads(alone)[0], heads(together)[number], strict=True):
            assert one.equal(other)
        assert alone["figures"] == together["figures"][number : number + 1]
    assert not heads(together)[0][0].equal(heads(together)[1][0])
    best = results(tmp_path / "all")["best"]
    values = {rate: results(tmp_path / rate)["best"]["value"] for rate in rates[:2]}
    assert best["value"] == max(values.values()) == values[f"{best['lr']:g}"]


def test_probing_leaves_the_encoder_and_fine_tuning_changes_it(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path))
    run_main(eval_linear, *arguments(tinted, tmp_path, opts=FINETUNE))
    probed, tuned = (encoder_weights(checkpoint(tmp_path, kind)) for kind in ("linprob", "ft"))
    torch.manual_seed(0)  # what --random-weights draws
    config = parse_arguments("", eval_linear.add_arguments, [
        str(a) for a in arguments(tinted, tmp_path)
    ])[1]  # fmt: skip
    initial = eval_linear.build_encoder(config, 0.0).state_dict()
    for name, value in initial.items():
        assert probed[f"encoder.{name}"].equal(value), name
        kept = name.startswith("norm.")  # MAE's classifier has a LayerNorm of its own
        assert tuned[f"encoder.{name}"].equal(value) == kept, name
    tuned = results(tmp_path, "ft")
    assert tuned["weights"] == "finetune" and tuned["protocol"]["name"] == "mae"


def test_a_frozen_encoder_keeps_no_activations(monkeypatch):
    from evaluation.linear import LinearClassifiers

    model = LinearClassifiers(create_encoder("vit_nano", 32, drop_path_rate=0.5), 4, 2, 0, True)
    model.train()
    assert not any(part.training for part in model.encoder.modules())
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape) or t, lambda t: t
    )
    with keep:
        scores = model(torch.randn(3, 3, 32, 32))
    assert scores.shape == (2, 3, 4) and scores.dtype == torch.float32
    assert kept and set(kept) <= {(3, 128), (128, 4), (4, 128)}
    scores.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.parametrize("opts", [[], FINETUNE], ids=["probe", "finetune"])
def test_resuming_changes_nothing(run_main, tinted, tmp_path, monkeypatch, opts):
    kind = "ft" if opts else "linprob"
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run_main(eval_linear, *arguments(tinted, straight, opts=opts))
    save = Session.save

    def stop_after_two(self):
        save(self)
        if self.progress.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "save", stop_after_two)
        run_main(eval_linear, *arguments(tinted, stopped, opts=opts))
    run_main(eval_linear, *arguments(tinted, stopped, opts=opts))
    assert "at update 12\n" in (folder(stopped, kind) / "log_rank0.txt").read_text()
    assert_same(checkpoint(straight, kind), checkpoint(stopped, kind))
    assert results(straight, kind) == results(stopped, kind)
    # once finished it is left alone
    before = (folder(stopped, kind) / "checkpoint.pth").read_bytes()
    run_main(eval_linear, *arguments(tinted, stopped, opts=opts))
    assert (folder(stopped, kind) / "checkpoint.pth").read_bytes() == before


def lines(output, kind):
    text = (folder(output, kind) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("updates", [1, 5, 6, 8])
@pytest.mark.parametrize("opts", [[], FINETUNE], ids=["probe", "finetune"])
def test_a_signal_within_an_epoch_changes_nothing(
    run_main, tinted, tmp_path, monkeypatch, opts, updates
):
    """SIGTERM after so many of 18 updates, 6 an epoch; also after the last one of an epoch."""
    kind = "ft" if opts else "linprob"
    flags = [] if opts else ["--lr", "1", "30"]
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run_main(eval_linear, *arguments(tinted, straight, *flags, opts=opts))
    make, left = Update.__call__, [updates]

    def then_stop(*given, **named):
        result = make(*given, **named)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # for the thread that waits for signals
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Update, "__call__", then_stop)
        run_main(eval_linear, *arguments(tinted, stopped, *flags, opts=opts))
    assert ended.value.code == RESUMABLE
    assert checkpoint(stopped, kind)["step"] == updates
    run_main(eval_linear, *arguments(tinted, stopped, *flags, opts=opts))
    assert f"at update {updates}\n" in (folder(stopped, kind) / "log_rank0.txt").read_text()
    assert_same(checkpoint(straight, kind), checkpoint(stopped, kind))
    assert results(straight, kind) == results(stopped, kind)
    steps = [
        [(x["kind"], x["step"]) for x in lines(o, kind) if x["kind"] != "start"]
        for o in (straight, stopped)
    ]
    assert steps[0] == steps[1] and ("train", 18) in steps[0] and ("epoch", 18) in steps[0]


def test_a_head_that_diverges_is_marked_and_left_out(run_main, tinted, tmp_path):
    """It skips its updates; the others are those that they would be alone."""
    opts = ["TRAIN.MAX_SKIPPED_UPDATES", "4"]
    run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "1e41", "3", opts=opts))
    run_main(eval_linear, *arguments(tinted, tmp_path / "alone", "--lr", "3", opts=opts))
    state = checkpoint(tmp_path)
    assert state["left_out"] == [True, False] and state["figures"][0] is None
    for one, other in zip(heads(state)[1], heads(checkpoint(tmp_path / "alone"))[0], strict=True):
        assert one.equal(other)
    written = lines(tmp_path, "linprob")
    train = [x for x in written if x["kind"] == "train"]
    assert {"loss@1e+41", "loss@3", "grad_norm@3", "lr@3", "skipped@3"} <= set(train[0])
    # the first update has rate 0, the second spoils the weights
    assert sum(x["skipped@1e+41"] for x in train) >= 15 and train[-1]["loss@1e+41"] is None
    assert not any(x["skipped@3"] for x in train) and all(x["loss@3"] > 0 for x in train)
    epochs = [x for x in written if x["kind"] == "epoch"]
    assert epochs[-1]["value@1e+41"] is None
    assert epochs[-1]["value@3"] == state["figures"][1]["value"]
    assert epochs[-1]["test_loss@3"] == state["figures"][1]["loss"]
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "updates skipped of rate 1e+41, as loss or gradient was not finite: 1" in log
    assert "updates skipped of rate 3" not in log


def test_a_bad_batch_is_skipped_by_all_heads(run_main, tinted, tmp_path, monkeypatch):
    """Weights and momentum stay, and training goes on."""
    make, count, seen = Update.__call__, [0], []

    def sometimes_bad(self, micro_batches, forward):
        count[0] += 1
        weights = [w.detach().clone() for w in self.ddp.module.heads.parameters()]

        def wrong(batch):
            output = forward(batch)
            output.loss = output.loss * (float("inf") if count[0] == 4 else 1)
            return output

        result = make(self, micro_batches, wrong)
        same = all(
            a.equal(b) for a, b in zip(weights, self.ddp.module.heads.parameters(), strict=True)
        )
        seen.append((result.finite.tolist(), same))
        return result

    monkeypatch.setattr(Update, "__call__", sometimes_bad)
    run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "1", "3"))
    assert seen[3] == ([False, False], True)
    assert all(finite == [True, True] for i, (finite, _) in enumerate(seen) if i != 3)
    assert not any(same for i, (_, same) in enumerate(seen) if i not in (0, 3))
    assert checkpoint(tmp_path)["left_out"] == [False, False]


def test_fine_tuning_that_diverges_stops(run_main, tinted, tmp_path):
    opts = [*FINETUNE, "TRAIN.MAX_SKIPPED_UPDATES", "3", "TRAIN.EPOCHS", "4"]
    with pytest.raises(UserError, match=r"updates in a row .* 3\): lower --lr 1e\+38$"):
        run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "1e38", opts=opts))


def test_a_probe_is_drawn(run_main, tinted, tmp_path, monkeypatch):
    run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "1", "3"))
    run_tool(monkeypatch, plot_run, folder(tmp_path), "--out", tmp_path / "probe.png")
    runs = plot_run.by_head({"probe": plot_run.read_metrics(str(folder(tmp_path)))})
    assert list(runs) == ["probe, rate 1", "probe, rate 3"]
    assert {"loss", "lr", "grad_norm", "value"} <= set(runs["probe, rate 1"])
    assert Image.open(tmp_path / "probe.png").size[0] > 1000


def test_another_encoder_starts_anew(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path))
    path = folder(tmp_path) / "checkpoint.pth"
    run_main(eval_linear, *arguments(tinted, tmp_path, opts=["SEED", "1"]))
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "of another evaluation (other weights; SEED 0 there, 1 here): starting anew" in log
    shutil.copy(path, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: checkpoint of another .*weights"):
        run_main(eval_linear, *arguments(tinted, tmp_path, "--resume", tmp_path / "other.pth"))


@pytest.mark.parametrize("opts", [[], FINETUNE], ids=["probe", "finetune"])
def test_eval_repeats_the_figures_and_saves_nothing(run_main, tinted, tmp_path, opts):
    kind = "ft" if opts else "linprob"
    flags = [] if opts else ["--lr", "1", "30"]
    run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=opts))
    names = ("results.json", "checkpoint.pth", "best.pth")
    before = [(folder(tmp_path, kind) / name).read_bytes() for name in names]
    log = folder(tmp_path, kind) / "log_rank0.txt"
    trained = log.read_text()
    # the weights come from the checkpoint, none are asked for
    run_main(eval_linear, *arguments(tinted, tmp_path, "--eval", opts=opts, random=False))
    assert [(folder(tmp_path, kind) / name).read_bytes() for name in names] == before
    assert log.read_text() == trained
    evaluated = (folder(tmp_path, kind) / "eval" / "log_rank0.txt").read_text()
    lines = [line.split("INFO ")[1] for line in evaluated.splitlines() if "INFO epoch" in line]
    assert len(lines) == (2 if opts else 3)
    assert all(line in trained for line in lines)


def test_throughput_saves_nothing(run_main, tinted, tmp_path, monkeypatch):
    monkeypatch.setattr(training_log, "THROUGHPUT_STEPS", 2)
    run_main(eval_linear, *arguments(tinted, tmp_path, "--throughput"))
    log = (folder(tmp_path) / "throughput" / "log_rank0.txt").read_text()
    assert "loader: " in log and "update: " in log
    assert not list(folder(tmp_path).rglob("*.pth"))


@pytest.mark.parametrize("flags", [["--accumulation-steps", "2"], ["--amp-opt-level", "O1"]])
@pytest.mark.parametrize("opts", [[], FINETUNE], ids=["probe", "finetune"])
def test_options_train(run_main, tinted, tmp_path, flags, opts):
    run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=[*opts, "TRAIN.EPOCHS", "1"]))
    kind = "ft" if opts else "linprob"
    assert all(v.isfinite().all() for v in checkpoint(tmp_path, kind)["model"].values())
    log = (folder(tmp_path, kind) / "log_rank0.txt").read_text()
    assert f"[0/1][{3 if flags[1] == '2' else 6}/" in log


def test_accumulation_equals_a_large_batch(run_main, tinted, tmp_path):
    alike = ["--drop-path-rate", "0"]  # which draws for each micro-batch
    flags = [*alike, "--accumulation-steps", "2"]  # of 8 images
    run_main(eval_linear, *arguments(tinted, tmp_path / "a", *flags))
    large = ["DATA.BATCH_SIZE", "16"]
    run_main(eval_linear, *arguments(tinted, tmp_path / "b", *alike, opts=large))
    for one, other in zip(
        heads(checkpoint(tmp_path / "a"))[0], heads(checkpoint(tmp_path / "b"))[0], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fine_tuning_computes_in_what_the_device_has_and_a_probe_does_not(
    run_main, tinted, tmp_path, monkeypatch
):
    """And a fine-tuning goes on as it was begun, but not as that of other weights."""
    flags = {"amx_bf16"}
    monkeypatch.setattr("utils.update.processor_flags", lambda: flags)

    def run(kind, *opts, resume=False):
        flags = ["--resume", folder(tmp_path, kind) / "checkpoint.pth"] if resume else []
        opts = [*opts, "AMP_OPT_LEVEL", "auto"]
        run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=opts))
        state = checkpoint(tmp_path, kind)
        (level,) = re.findall(r"^AMP_OPT_LEVEL: (\w+)$", state["config"], re.MULTILINE)
        found = json.loads((folder(tmp_path, kind) / "results.json").read_text())
        assert found["provenance"]["precision"] == state["provenance"]["precision"] == level
        return level

    short = ["TRAIN.WARMUP_EPOCHS", "0", "TRAIN.EPOCHS"]
    assert run("linprob", *short, "1") == "O0"
    tuned = [*FINETUNE, "TRAIN.TF32", "True", *short]
    assert run("ft", *tuned, "1") == "bfloat16"
    log = folder(tmp_path, "ft") / "log_rank0.txt"
    assert "computes in it); this processor has no TF32\n" in log.read_text()
    flags.clear()
    assert run("ft", *tuned, "2", resume=True) == "O0"
    flags.add("amx_bf16")
    assert run("ft", *tuned, "3", resume=True) == "O0"
    assert log.read_text().count("it goes on with O0: from here on products are in float32") == 1
    assert run("ft", *tuned, "1", "SEED", "5") == "bfloat16"


def test_swin_is_fine_tuned(run_main, tinted, tmp_path):
    opts = [*FINETUNE, "MODEL.ENCODER", "swin_tiny", "TRAIN.EPOCHS", "1", "DATA.BATCH_SIZE", "16"]
    run_main(eval_linear, *arguments(tinted, tmp_path, opts=opts))
    assert results(tmp_path, "ft")["last"]["loss"] < 2


def test_lbfgs(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path, "--probe", "lbfgs", "--num-l2", "6"))
    found = results(tmp_path, "linprob_lbfgs")
    assert found["probe"] == "lbfgs" and found["converged"] is True
    assert found["protocol"] == {"name": "lbfgs", "image_size": 32}
    assert 0 <= found["gradient_norm"] < 1e-3 and found["l2"] > 0
    chosen = {"epoch": None, "lr": None, "selected_on": "train"}
    assert found["best"] == {"value": 100.0, **chosen}
    assert found["last"].items() >= {"value": 100.0, "top1": 100.0, **chosen}.items()
    given = ("--eval", "--probe", "lbfgs")
    run_main(eval_linear, *arguments(tinted, tmp_path, *given, random=False))
    log = folder(tmp_path, "linprob_lbfgs") / "eval" / "log_rank0.txt"
    assert "top1 value 100.0000" in log.read_text()


def test_eval_judges_the_heads_that_were_probed(run_main, tinted, tmp_path):
    """best.pth tells them, the shapes do not."""
    probe = ("--probe", "lbfgs", "--num-l2", "3")
    run_main(eval_linear, *arguments(tinted, tmp_path, *probe, opts=["MODEL.NUM_HEADS", "8"]))
    kind = "linprob_lbfgs"
    assert checkpoint(tmp_path, kind, "best.pth")["provenance"]["network"]["num_heads"] == 8
    loss = results(tmp_path, kind)["last"]["loss"]
    path = folder(tmp_path, kind) / "best.pth"
    given = ("--eval", "--resume", path)
    run_main(eval_linear, *arguments(tinted, tmp_path / "b", *given, random=False))
    said = re.findall(r"loss ([\d.]+)", (folder(tmp_path / "b") / "eval/log_rank0.txt").read_text())
    assert float(said[-1]) == pytest.approx(loss, abs=1e-4)
    with pytest.raises(UserError, match=r"has MODEL\.NUM_HEADS 8, not 4"):
        opts = ["MODEL.NUM_HEADS", "4"]
        run_main(eval_linear, *arguments(tinted, tmp_path / "c", *given, opts=opts, random=False))


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_several_labels_an_image(run_main, tmp_path, probe):
    write_tiny("voc2007", str(tmp_path / "data"))
    flags = ["--dataset", "voc2007", "--probe", probe, "--num-l2", "3", "--lr", "30"]
    run_main(eval_linear, *arguments(tmp_path / "data", tmp_path, *flags))
    found = results(tmp_path, "linprob" if probe == "sgd" else "linprob_lbfgs", "voc2007")
    assert found["metric"] == "mAP" and 0 < found["best"]["value"] <= 100
    assert found["last"]["top1"] is None and found["last"]["loss"] > 0


def test_several_labels_are_fine_tuned(run_main, tmp_path):
    write_tiny("voc2007", str(tmp_path / "data"))
    flags, opts = ["--dataset", "voc2007"], [*FINETUNE, "TRAIN.EPOCHS", "1"]
    run_main(eval_linear, *arguments(tmp_path / "data", tmp_path, *flags, opts=opts))
    assert results(tmp_path, "ft", "voc2007")["metric"] == "mAP"


def test_classes_count_equally_where_the_protocol_says_so(run_main, tmp_path):
    write_tiny("pets", str(tmp_path / "data"))
    flags = ["--dataset", "pets", "--lr", "30"]
    run_main(eval_linear, *arguments(tmp_path / "data", tmp_path, *flags))
    assert results(tmp_path, "linprob", "pets")["metric"] == "mean_per_class"


MISTAKES = {
    "rates of fine-tuning": (["--lr", "1", "2"], FINETUNE, "fine-tuning takes one --lr"),
    "negative rate": (["--lr", "-1"], [], "different positive rates"),
    "same rates": (["--lr", "1", "1"], [], "different positive rates"),
    "lbfgs fine-tuning": (["--probe", "lbfgs"], FINETUNE, "needs a frozen encoder"),
    "protocol of fine-tuning": (["--protocol", "moby"], FINETUNE, "is not for fine-tuning"),
    "protocol of lbfgs": (["--probe", "lbfgs", "--protocol", "dino"], [], "is not for --probe"),
    "protocol": (["--protocol", "mae"], [], "mae is not for a probe by SGD, which has moby"),
    "blocks": (["--n-last-blocks", "2"], [], "are of --protocol dino"),
    "too many blocks": (["--protocol", "dino", "--n-last-blocks", "6"], [], "has 5 blocks"),
    "layer decay": (["--layer-decay", "2"], FINETUNE, "--layer-decay: invalid"),
    "data set": (["--dataset", "cifar11"], [], "invalid choice: 'cifar11'"),
    "data set in --opts": ([], ["DATA.DATASET", "cifar11"], "unknown data set 'cifar11'"),
    "missing files": (["--dataset", "pets"], [], "pets is not there"),
    "large batch": ([], ["DATA.BATCH_SIZE", "64"], "there are only 48"),
    "odd mixup": ([], [*FINETUNE, "DATA.BATCH_SIZE", "7"], "mixup pairs images"),
    "augmentation": ([], [*FINETUNE, "AUG.AUTO_AUGMENT", "rand-x9"], "refuses the augmentation"),
    "nothing to evaluate": (["--eval"], [], "no best.pth or checkpoint.pth to evaluate"),
    "one image": (
        [], [*FINETUNE, "MODEL.ENCODER", "timm/resnet18", "DATA.BATCH_SIZE", "1", "AUG.MIXUP", "0",
        "AUG.CUTMIX", "0"], "BatchNorm needs a total batch of at least 2 images"),
    "diverged": (["--lr", "1e41", "1e42"], [], "training diverged with all rates"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_named(run_main, tinted, tmp_path, mistake):
    flags, opts, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=opts))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_class_without_training_images_is_named(run_main, tinted, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tinted, data)
    shutil.rmtree(data / "train" / "class2")
    with pytest.raises(UserError, match="class2 is among the validation images, but has no train"):
        run_main(eval_linear, *arguments(data, tmp_path))


def test_a_class_without_test_images_does_not_renumber_the_others(run_main, tinted, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tinted, data)
    shutil.rmtree(data / "val" / "class1")
    run_main(eval_linear, *arguments(data, tmp_path, "--probe", "lbfgs", "--num-l2", "6"))
    assert results(tmp_path, "linprob_lbfgs")["best"]["value"] == 100


@pytest.mark.parametrize("wrong", ["of pre-training", "of other classes"])
def test_a_wrong_checkpoint_is_named(run_main, tinted, imagenet, tmp_path, wrong):
    path = tmp_path / "wrong.pth"
    if wrong == "of pre-training":
        model = {f"encoder.{k}": v for k, v in create_encoder("vit_nano", 32).state_dict().items()}
        torch.save({"model": model, "epoch": 0}, path)
    else:
        run_main(eval_linear, *arguments(imagenet, tmp_path, opts=["TRAIN.EPOCHS", "1"]))
        shutil.copy(folder(tmp_path) / "best.pth", path)
    with pytest.raises(UserError, match=r"wrong\.pth: (not a checkpoint of|of 2 classes)") as error:
        run_main(eval_linear, *arguments(tinted, tmp_path, "--eval", "--resume", path))
    assert "\n" not in str(error.value)


def test_features_that_are_not_finite_are_named(run_main, tinted, tmp_path, monkeypatch):
    load = eval_linear.load_pretrained_encoder

    def broken(*given, **named):
        encoder, origin = load(*given, **named)
        encoder.norm.weight.data.fill_(float("nan"))
        return encoder, origin

    monkeypatch.setattr(eval_linear, "load_pretrained_encoder", broken)
    with pytest.raises(UserError, match="features of image 0 are not finite"):
        run_main(eval_linear, *arguments(tinted, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linprob", "ft", "linprob_lbfgs"])
def test_processes_agree(tinted, tmp_path, kind):
    """Two processes of batch 8 against one of 16."""
    opts = FINETUNE if kind == "ft" else []
    # what each process draws for its own images is not compared
    opts = [*opts, "AUG.MIXUP", "0", "AUG.CUTMIX", "0", "TRAIN.EPOCHS", "2"]
    flags = ["--probe", "lbfgs", "--num-l2", "4"]
    flags = flags if kind == "linprob_lbfgs" else ["--drop-path-rate", "0"]
    found = []
    for processes, batch in ((0, "16"), (2, "8")):
        output = tmp_path / str(processes)
        given = arguments(tinted, output, *flags, opts=[*opts, "DATA.BATCH_SIZE", batch])
        done = run_forked("eval_linear.py", *given, processes=processes)
        assert done.returncode == 0, done.stdout
        found.append(results(output, kind))
    assert found[0]["last"]["loss"] == pytest.approx(found[1]["last"]["loss"], rel=2e-3)
    assert found[0]["best"]["value"] == pytest.approx(found[1]["best"]["value"], abs=9)


def provenance(output, kind="linprob"):
    return json.loads((folder(output, kind) / "results.json").read_text())["provenance"]


def last_line(output, kind="linprob"):
    return (folder(output, kind) / "log_rank0.txt").read_text().splitlines()[-1]


def test_by_default_all_images_train_and_test_images_choose_the_best(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path, "--lr", "3"))
    found = results(tmp_path)
    assert found["best"]["selected_on"] == "test" and found["last"]["selected_on"] is None
    assert (found["last"]["epoch"], found["last"]["lr"]) == (2, 3)
    figures = checkpoint(tmp_path)["figures"][0]
    assert {name: found["last"][name] for name in figures} == figures
    moby = {"name": "moby", "image_size": 32, "epochs": 3, "drop_path_rate": 0.2}
    assert found["protocol"] == moby
    assert "48 training and 48 test images" in (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "last: top1 " in last_line(tmp_path)
    assert last_line(tmp_path).endswith("(epoch and rate chosen on the test images)")
    entry = provenance(tmp_path)
    assert entry["data"]["images"] == {"train": 48, "test": 48} and entry["key"] == "random weights"
    for name in ("checkpoint.pth", "best.pth"):
        state = checkpoint(tmp_path, name=name)
        assert state["provenance"]["weights"] == entry["weights"]


@pytest.mark.parametrize("opts", [[], [*FINETUNE, "TRAIN.EPOCHS", "1"]], ids=["probe", "finetune"])
def test_held_out_images_choose(run_main, tinted, tmp_path, opts):
    kind = "ft" if opts else "linprob"
    flags = ["--select", "held-out", *([] if opts else ["--lr", "1", "30"])]
    run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=opts))
    found = results(tmp_path, kind)
    assert found["best"]["selected_on"] == "train" and 0 <= found["best"]["held_out"] <= 100
    assert (
        "43 training and 48 test images" in (folder(tmp_path, kind) / "log_rank0.txt").read_text()
    )
    assert last_line(tmp_path, kind).endswith("(epoch and rate chosen on held-out training images)")
    epochs = [line for line in lines(tmp_path, kind) if line["kind"] == "epoch"]
    name = "held_out" if opts else "held_out@30"
    assert all(line[name] % 20 == 0 for line in epochs)  # five images
    best = max(line[f"held_out@{r}"] for line in epochs for r in (1, 30)) if not opts else None
    assert best in (None, found["best"]["held_out"])
    assert provenance(tmp_path, kind)["data"]["images"] == {"train": 48, "test": 48}


def test_a_probe_with_another_choice_starts_anew(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path))
    run_main(eval_linear, *arguments(tinted, tmp_path, "--select", "held-out"))
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "(--select None there, held-out here): starting anew" in log


def test_a_probe_of_another_protocol_starts_anew(run_main, tinted, tmp_path):
    """One that names none is of version 0.1, whose protocol is plain."""
    plain = arguments(tinted, tmp_path, "--protocol", "plain")
    log = folder(tmp_path) / "log_rank0.txt"
    run_main(eval_linear, *plain)
    path = folder(tmp_path) / "checkpoint.pth"
    state = checkpoint(tmp_path)
    older = {k: v for k, v in state.items() if k not in ("protocol", "class_tokens", "provenance")}
    older["encoder"] = state["provenance"]["weights"]
    torch.save(older, path)
    run_main(eval_linear, *plain)
    assert "starting anew" not in log.read_text() and "after epoch 2" in log.read_text()
    shutil.copy(path, tmp_path / "older.pth")
    named = ("--resume", tmp_path / "older.pth")
    with pytest.raises(UserError, match=r"older\.pth: .* \(--protocol plain there, moby here\)"):
        run_main(eval_linear, *arguments(tinted, tmp_path / "b", *named))
    run_main(eval_linear, *arguments(tinted, tmp_path))
    assert "(--protocol plain there, moby here): starting anew" in log.read_text()
    opts = ["DATA.BATCH_SIZE", "8"]
    dino = ("--protocol", "dino", "--n-last-blocks")
    run_main(eval_linear, *arguments(tinted, tmp_path, *dino, "2", opts=opts))
    run_main(eval_linear, *arguments(tinted, tmp_path, *dino, "3", opts=opts))
    assert "(class tokens [2, False] there, [3, False] here): starting anew" in log.read_text()


@pytest.mark.parametrize("protocol", PROBES)
def test_eval_takes_the_protocol_of_the_checkpoint(run_main, tinted, tmp_path, protocol):
    opts = ["DATA.BATCH_SIZE", "8"]
    flags = ["--protocol", protocol] + ["--avgpool-patchtokens"] * (protocol == "dino")
    run_main(eval_linear, *arguments(tinted, tmp_path, *flags, opts=opts))
    loss = results(tmp_path)["last"]["loss"]
    run_main(eval_linear, *arguments(tinted, tmp_path, "--eval", random=False))
    said = (folder(tmp_path) / "eval" / "log_rank0.txt").read_text()
    assert f"loss {loss:.4f}" in said


def test_best_pth_comes_along_from_another_folder(run_main, tinted, tmp_path):
    """Where the checkpoint that --resume names is, and nothing better comes."""
    run_main(eval_linear, *arguments(tinted, tmp_path / "a", opts=["TRAIN.EPOCHS", "2"]))
    for name in ("checkpoint.pth", "best.pth"):
        state = checkpoint(tmp_path / "a", name=name)
        state["best"] = {"value": 101.0, "epoch": 0, "lr": 1.0}
        torch.save(
            state | ({"epoch": 0} if name == "best.pth" else {}), folder(tmp_path / "a") / name
        )
    path = folder(tmp_path / "a") / "checkpoint.pth"
    run_main(eval_linear, *arguments(tinted, tmp_path / "b", "--resume", path))
    assert results(tmp_path / "b")["best"]["epoch"] == 0
    assert checkpoint(tmp_path / "b", name="best.pth")["epoch"] == 0
    assert checkpoint(tmp_path / "b")["epoch"] == 2


@pytest.mark.parametrize("epoch", [0, 2])
def test_best_pth_is_what_results_call_best_after_a_kill(
    run_main, tinted, tmp_path, monkeypatch, epoch
):
    """Between the writing of checkpoint.pth and of best.pth, in the first epoch and the last."""
    given = arguments(tinted, tmp_path, "--lr", "0.01")

    def best_so_far(self, *_, **__):
        self.best = {"value": 100.0 + self.epoch, "epoch": self.epoch, "lr": 0.01}

    def killed(self, *_, **__):
        if self.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_linear.Judged, "log", best_so_far)  # before a checkpoint is written
        patch.setattr(eval_linear.Judged, "save_best", killed)
        run_main(eval_linear, *given)
    state = checkpoint(tmp_path)
    assert state["best"]["epoch"] == epoch and not (folder(tmp_path) / "best.pth").exists()
    run_main(eval_linear, *given)
    best = checkpoint(tmp_path, name="best.pth")
    assert results(tmp_path)["best"]["epoch"] == best["epoch"] == epoch
    for name in ("weight", "bias"):
        assert best["model"][f"heads.0.{name}"].equal(state["model"][f"heads.0.{name}"])


OTHERS = {
    "images": ([], [], "other images"),
    "crop": ([], ["TEST.CROP", "False"], "TEST.CROP True there, False here"),
    "size": ([], ["DATA.IMG_SIZE", "40"], "DATA.IMG_SIZE 32 there, 40 here"),
    "interpolation": ([], ["DATA.INTERPOLATION", "nearest"], "DATA.INTERPOLATION bilinear there"),
    "stochastic depth": (["--drop-path-rate", "0.5"], [], "--drop-path-rate 0.2 there, 0.5 here"),
    "rates": (["--lr", "2"], [], "--lr [1.0] there, [2.0] here"),
    "a rate's end": ([], ["TRAIN.MIN_LR", "0.1"], "TRAIN.MIN_LR 5e-06 there, 0.1 here"),
    "fewer epochs": ([], ["TRAIN.EPOCHS", "2"], "TRAIN.EPOCHS 3 there, 2 here"),
    "more epochs": ([], ["TRAIN.EPOCHS", "4"], "TRAIN.EPOCHS 3 there, 4 here"),
    "batch": (["--batch-size", "4"], [], "DATA.BATCH_SIZE 8 there, 4 here"),
    "accumulation": (["--accumulation-steps", "2"], [], "ACCUMULATION_STEPS 0 there, 2 here"),
    "precision": (["--amp-opt-level", "bfloat16"], [], "AMP_OPT_LEVEL O0 there, bfloat16 here"),
    "subset": (["--subset", "1.0"], [], ""),  # in a folder of its own
    "seed": (["--select", "held-out"], ["SEED", "1"], "other weights; SEED 0 there, 1 here"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_figures_of_other_images_or_settings_are_not_taken_over(run_main, tinted, tmp_path, case):
    """A finished probe gives the figures that a fresh one gives, in its results and checkpoint."""
    flags, opts, named = OTHERS[case]
    kept = ["--select", "held-out"] if "--select" in flags else []
    run_main(eval_linear, *arguments(tinted, tmp_path, *kept))
    data = tinted
    if case == "images":
        data = tmp_path / "data"
        shutil.copytree(tinted, data)
        (data / "val/class0/0.png").rename(data / "val/class0/x.png")
    for output in (tmp_path, tmp_path / "fresh"):
        changed = arguments(data, output, *flags, opts=opts)
        for place, word in enumerate(changed):  # a flag comes before --opts, and wins over it
            if word == "DATA.BATCH_SIZE" and "--batch-size" in flags:
                del changed[place : place + 2]
            if word == "AMP_OPT_LEVEL" and "--amp-opt-level" in flags:
                del changed[place : place + 2]
        run_main(eval_linear, *changed)
    kind = "linprob_subset_1" if case == "subset" else "linprob"
    log = (folder(tmp_path, kind) / "log_rank0.txt").read_text()
    assert named in log and "resumed from" not in log
    assert not named or "): starting anew" in log
    assert results(tmp_path, kind) == results(tmp_path / "fresh", kind)
    assert_same(checkpoint(tmp_path, kind), checkpoint(tmp_path / "fresh", kind))


def test_what_has_not_ended_goes_on_with_its_batches_divided_otherwise(
    run_main, tinted, tmp_path, monkeypatch
):
    """As on other machines, and says so; what has ended stays that of its own batches."""
    given = arguments(tinted, tmp_path, "--drop-path-rate", "0", opts=["DATA.BATCH_SIZE", "16"])
    save = Session.save

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "save", stop)
        run_main(eval_linear, *given)
    divided = arguments(tinted, tmp_path, "--drop-path-rate", "0", "--accumulation-steps", "2")
    run_main(eval_linear, *divided)
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "it goes on all the same: DATA.BATCH_SIZE 16 there, 8 here" in log
    assert "after epoch 0" in log and "starting anew" not in log


def test_logistic_regression_leaves_the_probe_by_steps(run_main, tinted, tmp_path):
    run_main(eval_linear, *arguments(tinted, tmp_path))
    before = results(tmp_path), (folder(tmp_path) / "best.pth").read_bytes()
    run_main(eval_linear, *arguments(tinted, tmp_path, "--probe", "lbfgs", "--num-l2", "2"))
    assert (results(tmp_path), (folder(tmp_path) / "best.pth").read_bytes()) == before
