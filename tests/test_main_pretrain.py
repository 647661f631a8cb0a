"""main_pretrain.py: every method, resumption, accumulation, and a user's mistakes."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    arguments,
    assert_same,
    build_update,
    run_forked,
    run_script,
    tiny,
    views_of,
    weights,
)

import main_pretrain
from models import METHODS
from models.momentum import MomentumMethod, key_momentum
from utils import training_log
from utils.errors import UserError
from utils.update import Precision, Update

ENCODERS = ["vit_nano", "swin_tiny"]
RATES = {"byol": 2e-4, "moby": 1e-3, "synco": 1e-3}  # BASE_LR of the recipes


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_process_trains(run_main, imagenet, tmp_path, method, encoder):
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path, "MODEL.ENCODER", encoder))
    folder = tmp_path / "run" / "default"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("checkpoint.pth", "checkpoint_previous.pth", "ckpt_epoch_1.pth"),
        *("config.json", "log_rank0.txt", "metrics.jsonl", ".lock"),
    }
    log = (folder / "log_rank0.txt").read_text()
    assert log.count("Train: [") == 12 and "Train: [1/2][6/6]" in log
    config = json.loads((folder / "config.json").read_text())
    assert config["MODEL"]["ENCODER"] == encoder and config["DATA"]["TRAINING_IMAGES"] == 24
    assert config["TRAIN"]["BASE_LR"] == pytest.approx(RATES[method] * 4 / 512)
    state = weights(tmp_path)
    assert set(state) >= {
        *("model", "optimizer", "lr_scheduler", "scaler", "epoch", "step", "rng_state", "config")
    }
    assert (state["epoch"], state["step"]) == (1, 12)
    assert all(v.isfinite().all() for v in state["model"].values())
    if method != "byol":
        assert int(state["model"]["queue_ptr"]) == 12 * 4 % 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "encoder", "run"),
    [
        ("byol", "vit_nano", run_forked),
        ("moby", "vit_nano", run_forked),
        ("synco", "vit_nano", partial(run_script, launcher="launch")),
        ("synco", "swin_tiny", partial(run_script, launcher="torchrun")),
    ],
)
def test_two_processes_train(imagenet, tmp_path, method, encoder, run):
    opts = arguments(method, imagenet, tmp_path, "MODEL.ENCODER", encoder, "TRAIN.EPOCHS", "1")
    done = run("main_pretrain.py", *opts, processes=2)
    assert done.returncode == 0, done.stdout
    assert "Train: [0/1][3/3]" in done.stdout
    assert (tmp_path / "run" / "default" / "log_rank1.txt").exists()
    assert weights(tmp_path)["step"] == 3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_resuming_changes_nothing(run_main, imagenet, tmp_path, method):
    """Bit for bit, with drop path, synthetic negatives, and a first stop by a shorter run."""
    opts = ("TRAIN.EPOCHS", "3", "SAVE_FREQ", "1")
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path / "a", *opts))
    folder = tmp_path / "b" / "run" / "default"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "a/run/default/ckpt_epoch_0.pth", folder / "checkpoint.pth")
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path / "b", *opts))
    assert "at update 6" in (folder / "log_rank0.txt").read_text()
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))

    explicit = ("MODEL.RESUME", tmp_path / "a/run/default/ckpt_epoch_1.pth")
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path / "c", *opts, *explicit))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_each_update_is_seeded_by_its_number(run_main, imagenet, tmp_path, monkeypatch):
    """Before anything of it is drawn; two runs that draw drop path and negatives are equal."""
    calls, order = [], []
    seed, make = main_pretrain.seed_step, Update.__call__
    monkeypatch.setattr(
        main_pretrain,
        "seed_step",
        lambda *key: (calls.append(key), order.append("seed"), seed(*key)),
    )
    monkeypatch.setattr(Update, "__call__", lambda *given: order.append("update") or make(*given))
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path, "SEED", "5"))
    assert calls == [(5, 0, step) for step in range(12)]
    assert order == ["seed", "update"] * 12


def test_the_key_branch_moves_by_the_schedule(run_main, imagenet, tmp_path, monkeypatch):
    seen, move = [], MomentumMethod.update_key_encoder

    def watched(self, momentum):
        before = self.projector_k.linear_out.weight.clone()
        move(self, momentum)
        online = self.projector.linear_out.weight
        expected = before.lerp(online, 1 - momentum)
        torch.testing.assert_close(self.projector_k.linear_out.weight, expected)
        seen.append(momentum)

    monkeypatch.setattr(MomentumMethod, "update_key_encoder", watched)
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path))
    assert seen == [key_momentum(0.99, step, 12) for step in range(12)]


@pytest.mark.slow
def test_two_processes_resume_exactly(imagenet, tmp_path):
    opts = ("TRAIN.EPOCHS", "2", "SAVE_FREQ", "1")
    for name in ("a", "b"):
        folder = tmp_path / name / "run" / "default"
        folder.mkdir(parents=True)
        if name == "b":
            shutil.copy(tmp_path / "a/run/default/ckpt_epoch_0.pth", folder / "checkpoint.pth")
        done = run_forked(
            "main_pretrain.py", *arguments("synco", imagenet, tmp_path / name, *opts), processes=2
        )
        assert done.returncode == 0, done.stdout
    assert "resumed from" in done.stdout
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_finished_run_is_left_alone(run_main, imagenet, tmp_path):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, *opts)
    before = (tmp_path / "run/default/checkpoint.pth").read_bytes()
    run_main(main_pretrain, *opts)
    assert (tmp_path / "run/default/checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("method", ["byol", "moby"])
def test_accumulation_equals_a_large_batch(process_group, method):
    """Three micro-batches of 4 against one batch of 12, without BatchNorm and drop path.

    By plain SGD: Adam would blow up the rounding of gradients that are zero in theory.
    """
    config, run = tiny(
        f"configs/{method}_vit_tiny.yaml",
        *("MODEL.ONLINE_DROP_PATH_RATE", "0", "MODEL.CONTRAST_NUM_NEGATIVE", "18"),
        *("MODEL.PROJ_NUM_LAYERS", "1", "MODEL.PRED_NUM_LAYERS", "1"),
        *("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.BASE_LR", "0.1"),
    )
    torch.manual_seed(0)
    views = torch.randint(0, 256, (2, 2, 12, 32, 32, 3), dtype=torch.uint8)
    results = []
    for parts in (1, 3):
        torch.manual_seed(1)
        model, _, update = build_update(config, run)
        for first, second in views:
            model.update_key_encoder(0.9)
            batch = list(zip(first.chunk(parts), second.chunk(parts), strict=True))
            figures = update(batch).figures
        for name in ("feature_std", *(("accuracy", "negative") if method == "byol" else ())):
            del figures[name]  # among the images of a smaller batch it is another, of course
        results.append(dict(model.state_dict(), **figures))
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulation_in_the_script(run_main, imagenet, tmp_path):
    opts = arguments("synco", imagenet, tmp_path, "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, "--accumulation-steps", "2", *opts)
    state = weights(tmp_path)
    assert state["step"] == 3
    # 3 updates of 2 x 4 keys, and the rate of 8 images an update
    assert int(state["model"]["queue_ptr"]) == 24
    assert "base rate 1.56e-05" in (tmp_path / "run/default/log_rank0.txt").read_text()


def test_gradient_norms_are_those_of_the_parts(process_group, monkeypatch):
    """Of the mean over micro-batches, before clipping."""
    config, run = tiny("configs/demo.yaml", "TRAIN.CLIP_GRAD", "0.5")
    model, optimizer, update = build_update(config, run)
    batch = [torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    torch.manual_seed(0)
    for views in batch:
        output = main_pretrain.forward_views(model, run.device, 0, views_of(*views))
        (output.loss / 2).backward()
    gradients = {
        name: [p.grad.clone() for p in getattr(model, name).parameters() if p.grad is not None]
        for name in main_pretrain.PARTS
    }
    optimizer.zero_grad()
    torch.manual_seed(0)
    figures = update(batch).figures
    for name, own in gradients.items():
        expected = torch.cat([g.flatten() for g in own]).double().norm()
        assert float(figures[f"grad_norm_{name}"]) == pytest.approx(float(expected), rel=1e-3)
    everything = torch.cat([g.flatten() for own in gradients.values() for g in own])
    expected = float(everything.double().norm())
    assert float(figures["grad_norm"]) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.5


def test_clipping_bounds_the_update(process_group):
    """Plain SGD without decay moves the weights by rate x clipped norm."""
    config, run = tiny(
        "configs/demo.yaml",
        *("TRAIN.CLIP_GRAD", "1.0", "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.BASE_LR", "1.0"),
        *("TRAIN.OPTIMIZER.MOMENTUM", "0", "TRAIN.WEIGHT_DECAY", "0"),
    )
    model, _, update = build_update(config, run)
    before = [p.clone() for p in model.parameters()]
    batch = [torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)]
    figures = update(batch).figures
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert figures["grad_norm"] > 1  # the norm before clipping is what is reported
    assert float(moved.detach().norm()) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("flags", [["--amp-opt-level", "O1"], ["--use-checkpoint"]])
def test_options_train(run_main, imagenet, tmp_path, flags):
    opts = arguments("synco", imagenet, tmp_path, "MODEL.WARMUP_EPOCHS", "0", "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, *flags, *opts)
    assert weights(tmp_path)["step"] == 6


def test_throughput_and_eval_save_nothing(run_main, imagenet, tmp_path, monkeypatch):
    monkeypatch.setattr(training_log, "THROUGHPUT_STEPS", 2)
    opts = arguments("moby", imagenet, tmp_path)
    run_main(main_pretrain, "--throughput", *opts)
    log = (tmp_path / "run/default/throughput/log_rank0.txt").read_text()
    assert "loader: " in log and "update: " in log
    assert not list((tmp_path / "run/default").rglob("*.pth"))
    with pytest.raises(UserError, match="run/default: no checkpoint to evaluate"):
        run_main(main_pretrain, "--eval", *opts)
    run_main(main_pretrain, *opts, "TRAIN.EPOCHS", "1")
    files = set((tmp_path / "run/default").rglob("*.pth"))
    run_main(main_pretrain, "--eval", *opts, "DATA.BATCH_SIZE", "3")
    log = (tmp_path / "run/default/eval/log_rank0.txt").read_text()
    assert "Eval: loss" in log and "of 6 of 7 images" in log
    assert set((tmp_path / "run/default").rglob("*.pth")) == files


MISTAKES = {
    "no data path": ([], "set --data-path"),
    "missing data path": ([], "nowhere: the data path does not exist"),
    "batch larger than the data": (["DATA.BATCH_SIZE", "30", "MODEL.CONTRAST_NUM_NEGATIVE", "64"],
                                   "one update takes 30 images, but there are only 24"),
    "batch larger than the queue": (["DATA.BATCH_SIZE", "12", "MODEL.CONTRAST_NUM_NEGATIVE", "8"],
                                    "an update of 12 images does not fit into"),
    "batch of one": (["DATA.BATCH_SIZE", "1"], "at least 2 images"),
    "augmentation": (["AUG.SSL_AUG_TYPE", "x"], "the augmentation must be byol, simclr or custom"),
    "single view": (["AUG.SSL_AUG", "False"], "set AUG.SSL_AUG True"),
    "checkpoint missing": (["MODEL.RESUME", "gone.pth"], "gone.pth: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_named(run_main, imagenet, tmp_path, mistake):
    opts, message = MISTAKES[mistake]
    path = {"no data path": "", "missing data path": "nowhere"}.get(mistake, imagenet)
    given = arguments("moby", path, tmp_path, *opts)
    with pytest.raises(UserError) as error:
        run_main(main_pretrain, *given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "pickle", "other encoder", "other method"]
)
def test_a_checkpoint_that_does_not_fit_is_named_and_kept(run_main, imagenet, tmp_path, damage):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    path = tmp_path / "run/default/checkpoint.pth"
    method, opts = "moby", []
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        torch.save(SimpleNamespace(), path)
    elif damage == "other encoder":
        opts = ["MODEL.ENCODER", "vit_tiny"]
    else:
        method = "byol"
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"checkpoint\.pth: ") as error:
        run_main(main_pretrain, *arguments(method, imagenet, tmp_path, *opts))
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_bad_image_ends_in_one_line(imagenet, tmp_path, processes):
    """The whole way: from a data worker to standard error and the exit code."""
    data = tmp_path / "data"
    shutil.copytree(imagenet, data)
    (data / "train/class1/7.jpg").write_text("no image")
    opts = arguments("moby", data, tmp_path / "out")
    run = run_script if processes else run_forked
    done = run("main_pretrain.py", *opts, processes=processes)
    assert done.returncode != 0
    lines = [x for x in done.stdout.splitlines() if x.startswith("main_pretrain.py: error: ")]
    assert lines and "class1/7.jpg: not a readable image" in lines[0]
    if not processes:  # a launcher prints its own account
        assert done.returncode == 1 and "Traceback" not in done.stdout


@pytest.mark.parametrize("flag", [["--frobnicate"], ["--cfg", "nowhere.yaml"]])
def test_mistakes_on_the_command_line_end_in_one_line(flag):
    done = run_script("main_pretrain.py", *flag)
    assert done.returncode == 1
    assert done.stdout.startswith("main_pretrain.py: error: ") and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--profile", "3", "--eval"], "--profile needs updates: leave out --eval and"),
        (["--profile", "3", "--throughput"], "--profile needs updates"),
        (["--profile", "0"], "--profile: invalid number value: '0'"),
    ],
)
def test_what_cannot_be_profiled(run_main, imagenet, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        run_main(main_pretrain, *flags, *arguments("moby", imagenet, tmp_path))
    assert not list(tmp_path.iterdir())


def test_float16_scales_the_loss(process_group):
    """What a GPU without bfloat16 does: a finite update, then one that overflows is skipped."""
    config, run = tiny("configs/demo.yaml")
    precision = run.precision = Precision("O1", run.device)
    precision.dtype = torch.float16
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model, _, update = build_update(config, run)
    batch = [torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)]
    weight = model.projector.linear_out.weight

    before = weight.clone()
    result = update(batch)
    assert result.finite and not weight.equal(before)
    assert all(value.isfinite() for value in result.figures.values())
    assert result.figures["grad_norm"] < 1e3  # of the gradient itself, not of the scaled one

    precision.scaler.update(2.0**60)
    before = weight.clone()
    assert not update(batch).finite
    assert weight.equal(before)
    assert precision.scaler.get_scale() == 2.0**59


def changed(run_main, imagenet, output, *opts) -> str:
    """What the log says of a run that goes on with other settings."""
    run_main(main_pretrain, *arguments("moby", imagenet, output, *opts))
    return (output / "run/default/log_rank0.txt").read_text()


def test_a_run_goes_on_with_the_settings_that_it_is_given_and_says_so(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    log = changed(run_main, imagenet, tmp_path, "TRAIN.WEIGHT_DECAY", "0.5")
    said = "TRAIN.EPOCHS 1, now 2; TRAIN.WEIGHT_DECAY 0.05, now 0.5"
    assert f"was written with other settings: {said}" in log and "other images" not in log
    groups = weights(tmp_path)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


def test_a_finished_run_keeps_its_config(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    config = tmp_path / "run/default/config.json"
    before = config.read_bytes()
    opts = ("TRAIN.EPOCHS", "1", "MODEL.CONTRAST_TEMPERATURE", "0.07")
    log = changed(run_main, imagenet, tmp_path, *opts)
    assert "MODEL.CONTRAST_TEMPERATURE 0.2, now 0.07" in log
    with pytest.raises(UserError, match="bylo"):
        changed(run_main, imagenet, tmp_path, "MODEL.TYPE", "bylo")
    assert config.read_bytes() == before


def test_other_images_are_told_by_their_names(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    data = tmp_path / "data"
    shutil.copytree(imagenet, data)
    (data / "train/class0/0.jpg").rename(data / "train/class0/x.jpg")
    log = changed(run_main, data, tmp_path)
    assert "was written with other images: their names or labels differ" in log


def test_the_state_of_another_kind_of_optimizer_is_refused(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    with pytest.raises(UserError, match=r"another optimizer \(it has \['betas'\], not \['momentum"):
        changed(run_main, imagenet, tmp_path, "TRAIN.OPTIMIZER.NAME", "sgd")


def test_a_run_goes_on_where_the_file_that_it_began_from_is_gone(run_main, imagenet, tmp_path):
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    log = changed(run_main, imagenet, tmp_path, "MODEL.RESUME", tmp_path / "gone.pth")
    assert "continuing from the run's own" in log and weights(tmp_path)["epoch"] == 1
