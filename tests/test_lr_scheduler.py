"""Schedules and their scaling."""

import pytest
import torch
from helpers import ROOT, reference

from lr_scheduler import READ_BY, REFERENCE_BATCH, build_scheduler, scaled_rates, without_effect
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


def rates_of(config):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.TRAIN.BASE_LR)
    scheduler = build_scheduler(config, optimizer, scaled_rates(config, REFERENCE_BATCH), 5)
    rates = []
    for step in range(5 * config.TRAIN.EPOCHS):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
@pytest.mark.parametrize(
    ("key", "value"), [(key, 0.125) for key in READ_BY] + [("TRAIN.BASE_LR", 9)]
)
def test_a_key_that_changes_no_rate_is_said_to_have_no_effect(name, key, value):
    """And only such a key: the rates tell."""
    value = 2 if key.endswith("EPOCHS") else value
    plain = configured("TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.EPOCHS", 40)
    config = configured("TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.EPOCHS", 40, key, value)
    said = without_effect(config, {key})
    assert [line.split()[0] for line in said] == [key] * (rates_of(config) == rates_of(plain))
    assert not without_effect(config, set())


def test_a_warm_up_that_does_not_end_is_said():
    config = configured("TRAIN.EPOCHS", 5, "TRAIN.WARMUP_EPOCHS", 6)
    assert "never reaches TRAIN.BASE_LR" in without_effect(config, set())[0]
    assert max(rates_of(config)) < config.TRAIN.BASE_LR
    assert not without_effect(configured("TRAIN.EPOCHS", 6, "TRAIN.WARMUP_EPOCHS", 5), set())
