"""Schedules and their scaling."""

import pytest
import torch
from helpers import ROOT, reference

from lr_scheduler import REFERENCE_BATCH, build_scheduler, scaled_rates
from utils.config import load_config
from utils.errors import UserError
from utils.progress import images_per_update

SCHEDULES = reference("schedules.json")


def configured(*opts):
    return load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), [str(o) for o in opts])


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_rates_are_the_published_ones(name):
    s = SCHEDULES
    config = configured(
        *("TRAIN.EPOCHS", s["epochs"], "TRAIN.WARMUP_EPOCHS", s["warmup_epochs"]),
        *("TRAIN.BASE_LR", s["base_lr"], "TRAIN.WARMUP_LR", s["warmup_lr"]),
        *("TRAIN.MIN_LR", s["min_lr"], "TRAIN.LR_SCHEDULER.NAME", name),
        *("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", s["decay_epochs"]),
        *("TRAIN.LR_SCHEDULER.DECAY_RATE", s["decay_rate"]),
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.TRAIN.BASE_LR)
    scheduler = build_scheduler(
        config, optimizer, scaled_rates(config, REFERENCE_BATCH), s["steps_per_epoch"]
    )
    rates = []
    for step in range(s["epochs"] * s["steps_per_epoch"]):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(s["lr_after_step_update"][name], rel=1e-9)


def test_rates_follow_from_the_step_alone():
    config = configured("TRAIN.EPOCHS", 10)
    rates = []
    for first in (0, 33):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.TRAIN.BASE_LR)
        scheduler = build_scheduler(config, optimizer, scaled_rates(config, REFERENCE_BATCH), 5)
        for step in range(first, 40):
            scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("batch", "world", "accumulation", "factor"),
    [(512, 1, 0, 1), (128, 4, 1, 1), (64, 8, 2, 2), (16, 2, 0, 1 / 16)],
)
def test_rates_scale_with_the_images_of_an_update(monkeypatch, batch, world, accumulation, factor):
    config = configured("DATA.BATCH_SIZE", batch, "TRAIN.ACCUMULATION_STEPS", accumulation)
    monkeypatch.setattr("utils.progress.world_size", lambda: world)
    rates = scaled_rates(config, images_per_update(config)).by_key()
    assert set(rates) == {"TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR"}
    for key, rate in rates.items():
        assert rate == pytest.approx(config.TRAIN[key.removeprefix("TRAIN.")] * factor)


def test_unknown_schedule_is_named():
    config = configured("TRAIN.LR_SCHEDULER.NAME", "cyclic")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(UserError, match="must be cosine, linear or step, got 'cyclic'"):
        build_scheduler(config, optimizer, scaled_rates(config, REFERENCE_BATCH), 5)
