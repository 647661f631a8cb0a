"""SynCoLoss: the loss of SynCo by itself, as other projects use it."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from torch import nn

import models.synco
from models import build_method
from models.synco import SynCoLoss, synco_loss

SETTINGS = {"n_hard": 16, "counts": (4, 5, 6, 7, 8, 9)}


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_example_runs():
    assert doctest.testmod(models.synco).attempted == 4
    assert doctest.testmod(models.synco).failed == 0


def test_it_is_the_loss_of_the_method():
    """Both directions, with gradient, from the same draws."""
    config, _ = tiny("configs/synco_vit_tiny.yaml", "MODEL.CONTRAST_NUM_NEGATIVE", "64")
    config.MODEL.N_HARD = SETTINGS["n_hard"]
    for number, count in enumerate(SETTINGS["counts"], 1):
        config.MODEL[f"N{number}"] = count
    config.MODEL.WARMUP_EPOCHS = 0
    method = build_method(config)
    ours, theirs = ([unit(8, 256, seed=i).requires_grad_() for i in (1, 2)] for _ in range(2))
    keys = [unit(8, 256, seed=i) for i in (3, 4)]
    torch.manual_seed(7)
    expected = method.loss(*ours, *keys, epoch=0).loss
    expected.backward()
    torch.manual_seed(7)
    loss = SynCoLoss(config.MODEL.CONTRAST_TEMPERATURE, **SETTINGS)
    found = loss(theirs[0], keys[1], method.queue2) + loss(theirs[1], keys[0], method.queue1)
    found.backward()
    assert found.equal(expected)
    assert all(a.grad.equal(b.grad) for a, b in zip(ours, theirs, strict=True))
    assert not list(loss.state_dict()) and not list(loss.parameters())


def test_the_function_is_the_module():
    q, k, queue = unit(4, 32), unit(4, 32, seed=1), unit(64, 32, seed=2).T
    torch.manual_seed(0)
    first = synco_loss(q, k, queue, temperature=0.5, sigma=0.3, **SETTINGS)
    torch.manual_seed(0)
    assert SynCoLoss(0.5, sigma=0.3, **SETTINGS)(q, k, queue).equal(first)
    assert not torch.equal(synco_loss(q, k, queue, temperature=0.5, **SETTINGS), first)


def test_without_synthetic_negatives_it_is_infonce():
    q, k, queue = unit(4, 32), unit(4, 32, seed=1), unit(64, 32, seed=2).T
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert synco_loss(q, k, queue, n_hard=1, counts=(0,) * 6).equal(expected)


def test_half_precision_is_computed_in_float32():
    q, k, queue = unit(4, 32).bfloat16(), unit(4, 32, seed=1).bfloat16(), unit(64, 32).T.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = synco_loss(q, k, queue, **SETTINGS)
    assert loss.dtype == torch.float32 and loss.isfinite()


CANCELLING = {"alpha": (0.5, 0.5), "beta": (0.5, 0.5), "gamma": (0.5, 0.5), "delta": 1.0}


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("keys", ["opposite", "zero", "opposite pairs", "equal", "signs"])
def test_vectors_that_cancel_give_similarities_still(kind, keys):
    """Of each kind alone, where n is -q, 0, -n', q or -sign(q)/|sign(q)|: no NaN, none above 1."""
    q = unit(64, 16).requires_grad_()
    own = q.detach()
    queue = {
        "opposite": -own,
        "zero": torch.zeros(64, 16),
        "opposite pairs": torch.cat([unit(1, 16), -unit(1, 16)]).repeat(32, 1),
        "equal": own,
        "signs": F.normalize(-own.sign(), dim=1),
    }[keys].T
    counts = [50 * (number == kind) for number in range(6)]
    loss = SynCoLoss(n_hard=64, counts=counts, sigma=0.0, eta=16**-0.5, **CANCELLING)
    similarity = q @ queue
    found = torch.cat(loss.synthetic(q, similarity, queue, loss.draw(similarity, 16)), 1)
    assert found.shape == (64, 50) and found.abs().max() < 1.01  # NaN fails too
    found.sum().backward()
    assert q.grad.isfinite().all()
    assert loss(q, own, queue).isfinite()


@pytest.mark.parametrize("wrong", [{"counts": (1,) * 5}, {"counts": (-1,) * 6}, {"n_hard": 0}])
def test_mistakes_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        SynCoLoss(**wrong)


def train(queue_of) -> list[float]:
    """Losses of MoCo's structure over some updates of two views of the same images."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
    key_encoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
    key_encoder.load_state_dict(encoder.state_dict())
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    loss_of = SynCoLoss(temperature=0.2, **SETTINGS)
    losses = []
    for _ in range(200):
        images = torch.randn(32, 12)
        one, other = (images + 0.1 * torch.randn(32, 12) for _ in range(2))
        with torch.no_grad():
            for key, own in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                key.lerp_(own, 0.1)
            k = F.normalize(key_encoder(other), dim=1)
        loss = loss_of(F.normalize(encoder(one), dim=1), k, queue_of(k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_moco_learns_with_it():
    queue = unit(256, 16)

    def shift(keys):
        before = queue.clone()
        queue.copy_(torch.cat([queue[len(keys) :], keys]))
        return before.T

    losses = train(shift)
    assert sum(losses[-10:]) < 0.8 * sum(losses[5:15])


def test_lightlys_moco_learns_with_it():
    memory = pytest.importorskip("lightly.models.modules.memory_bank")
    bank = memory.MemoryBankModule(size=(256, 16))
    losses = train(lambda keys: bank(keys, update=True)[1])
    assert sum(losses[-10:]) < 0.8 * sum(losses[5:15])
