"""One update: micro-batches, clipping, skipping, and optimizers that are judged apart."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from utils.distributed import data_parallel
from utils.errors import UserError
from utils.update import Forward, Precision, Update, poisoned_if_not_finite

CPU = torch.device("cpu")


class Heads(nn.Module):
    """Linear heads of one value on the same input, behind BatchNorm."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.stack([head(x).square().mean() for head in self.heads])


def build(count: int = 2, clip: float = 0.0, kind=None, model=None, **more):
    model = model or Heads(count)
    ddp = data_parallel(model, CPU)
    kind = kind or partial(torch.optim.SGD, lr=0.1)
    optimizers = [kind(head.parameters()) for head in model.heads]
    return model, ddp, Update(ddp, optimizers, Precision("O0", CPU), clip, **more)


def forward(ddp, batch) -> Forward:
    x, factors = batch
    loss = ddp(x) * factors
    return Forward(loss, figures={"double": 2 * loss.detach()})


def batches(*factors) -> list:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, generator=generator), torch.tensor(f)) for f in factors]


def by_hand(model, micro_batches) -> list[list[torch.Tensor]]:
    """The gradients of each head, of the mean over micro-batches."""
    for batch in micro_batches:
        (forward(model, batch).loss / len(micro_batches)).sum().backward()
    gradients = [[p.grad.clone() for p in head.parameters()] for head in model.heads]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("clip", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 3])
def test_each_optimizer_steps_by_its_clipped_mean_gradient(process_group, clip, count):
    micro = batches([1.0, 3.0, 0.01][:count], [2.0, 5.0, 0.02][:count])
    gradients = by_hand(Heads(count), micro)
    model, ddp, update = build(count, clip)
    before = [[p.clone() for p in head.parameters()] for head in model.heads]
    result = update(micro, partial(forward, ddp))
    for i, head in enumerate(model.heads):
        norm = torch.stack([g.norm() for g in gradients[i]]).norm()
        torch.testing.assert_close(result.figures["grad_norm"][i], norm)
        factor = min(1.0, clip / float(norm)) if clip else 1.0
        for p, old, g in zip(head.parameters(), before[i], gradients[i], strict=True):
            torch.testing.assert_close(p, old - 0.1 * factor * g, rtol=1e-4, atol=1e-6)
            assert p.grad is None
    assert result.finite.tolist() == [True] * count and len(result.outputs) == 2
    losses = torch.stack([o.loss for o in result.outputs])
    assert not losses.requires_grad
    torch.testing.assert_close(result.figures["loss"], losses.mean(0))
    torch.testing.assert_close(result.figures["double"], 2 * losses.mean(0))
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e38])
def test_one_optimizer_is_skipped_and_the_others_are_not(process_group, bad, momentum):
    kind = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    model, ddp, update = build(2, 1.0, kind)
    alone, ddp_alone, update_alone = build(1, 1.0, kind)
    alone.heads[0].load_state_dict(model.heads[1].state_dict())
    for number in range(3):
        before = [p.clone() for p in model.heads[0].parameters()]
        statistics = model.norm.running_mean.clone()
        micro = batches([bad * (1e3 if bad == 1e38 else 1) if number == 1 else 1.0, 2.0])
        result = update(micro, partial(forward, ddp))
        update_alone([(micro[0][0], micro[0][1][1:])], partial(forward, ddp_alone))
        same = all(a.equal(b) for a, b in zip(before, model.heads[0].parameters(), strict=True))
        assert result.finite.tolist() == [number != 1, True] and same == (number == 1)
        # statistics that the bad loss had a part in are put back
        assert model.norm.running_mean.equal(statistics) == (number == 1)
    for p, other in zip(model.heads[1].parameters(), alone.heads[0].parameters(), strict=True):
        assert p.equal(other)


def test_rows_of_skipped_updates(process_group):
    _, ddp, update = build(2)
    for first, second in ((1, 1), (0, 1), (0, 0), (1, 0), (0, 1), (1, 1)):
        factors = [1.0 if made else math.nan for made in (first, second)]
        update(batches(factors), partial(forward, ddp))
    assert update.check_skipped(3, "x") == [False, False]
    # both had a row of two
    with pytest.raises(UserError, match=r"^2 updates in a row .*MAX_SKIPPED_UPDATES 2\): stop$"):
        update.check_skipped(2, "stop")
    update(batches([math.nan, 1.0]), partial(forward, ddp))
    for _ in range(2):
        update(batches([math.nan, 1.0]), partial(forward, ddp))
    assert update.check_skipped(3, "x") == [True, False]


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_the_state_is_that_of_one_optimizer_with_all_groups(process_group, kind):
    model, ddp, update = build(3, kind=kind)
    whole = kind([{"params": list(head.parameters())} for head in model.heads])
    update(batches([1.0, 2.0, 3.0]), partial(forward, ddp))
    state = update.state_dict()
    whole.load_state_dict(state["optimizer"])  # torch accepts it
    assert state["scaler"] == {}
    assert [g["params"] for g in state["optimizer"]["param_groups"]] == [[0, 1], [2, 3], [4, 5]]
    for optimizer, head in zip(update.optimizers, model.heads, strict=True):
        for p in head.parameters():
            for name, value in optimizer.state[p].items():
                assert torch.as_tensor(whole.state[p][name]).equal(torch.as_tensor(value)), name

    other, ddp_other, again = build(3, kind=kind)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(state))  # as from a file
    for own, one in ((update, ddp), (again, ddp_other)):
        own(batches([3.0, 1.0, 2.0]), partial(forward, one))
    for p, same in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(same)
    _, _, fewer = build(2, kind=kind)
    with pytest.raises(ValueError, match="1 groups of weights too many"):
        fewer.load_state_dict(state)


class Two(nn.Module):
    """Two parts and one loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()).square().mean()


def test_norms_of_named_parts(process_group):
    model = Two()
    ddp = data_parallel(model, CPU)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parts = {"first": model.first, "second": model.second}
    update = Update(ddp, [optimizer], Precision("O0", CPU), 0.01, parts)
    x = torch.randn(6, 3)
    model(x).backward()
    norms = [
        torch.cat([p.grad.flatten() for p in part.parameters()]).norm() for part in parts.values()
    ]
    model.zero_grad()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    result = update([x], lambda batch: Forward(ddp(batch)))
    found = result.figures
    torch.testing.assert_close(found["grad_norm_first"], norms[0])
    torch.testing.assert_close(found["grad_norm_second"], norms[1])
    torch.testing.assert_close(found["grad_norm"], torch.stack(norms).norm())
    assert set(found) == {"loss", "grad_norm", "grad_norm_first", "grad_norm_second"}
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert result.finite.shape == () and update.check_skipped(1, "") == [False]


def test_float16_scales_unless_told_not_to(process_group):
    precision = Precision("O0", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = Heads(1)
    optimizer = torch.optim.SGD(model.heads.parameters(), 0.1)
    ddp = data_parallel(model, CPU)
    scaled = Update(ddp, [optimizer], precision)
    assert scaled.scaler is precision.scaler
    result = scaled(batches([1.0]), partial(forward, ddp))
    plain_model, plain_ddp, plain = build(1)
    expected = plain(batches([1.0]), partial(forward, plain_ddp))
    torch.testing.assert_close(result.figures["grad_norm"], expected.figures["grad_norm"])
    for p, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(p, other)
    assert scaled.state_dict()["scaler"]["scale"] == 8.0
    scaled(batches([math.inf]), partial(forward, ddp))
    assert precision.scaler.get_scale() == 4.0  # an overflow halves it
    other = Update(ddp, [optimizer], precision, scale=False)
    other(batches([math.inf]), partial(forward, ddp))
    assert precision.scaler.get_scale() == 4.0 and other.scaler.get_scale() == 1.0
    again = Update(ddp, [optimizer], precision)
    again.load_state_dict(
        scaled.state_dict() | {"scaler": scaled.scaler.state_dict() | {"scale": 2.0}}
    )
    assert precision.scaler.get_scale() == 2.0


def test_poison_reaches_the_gradient_of_its_own_loss_alone():
    x = torch.ones(3, requires_grad=True)
    loss = x * torch.tensor([1.0, math.inf, 2.0])
    poisoned = poisoned_if_not_finite(loss)
    assert poisoned[0] == 1 and poisoned[1].isnan() and poisoned[2] == 2
    poisoned.sum().backward()
    assert x.grad[0] == 1 and x.grad[1].isnan() and x.grad[2] == 2


def test_statistics_of_every_type_and_shape_are_put_back(process_group):
    """Also those that the skipped update has made NaN; layers that do not train are left alone."""
    model = Heads(1)
    model.more = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.BatchNorm1d(4).eval()])
    ddp = data_parallel(model, CPU)
    update = Update(ddp, [torch.optim.SGD(model.heads.parameters(), 0.1)], Precision("O0", CPU))
    before = {name: b.clone() for name, b in model.named_buffers()}

    def spoil(bad: float):
        copies = update._copy_statistics()
        assert {flat.dtype for _, flat in copies} == {torch.float32, torch.int64}
        with torch.no_grad():
            for number, buffer in enumerate(model.buffers()):
                buffer.fill_(bad if buffer.is_floating_point() else number)
        update._restore_statistics(copies, torch.tensor([bad == 7.0]))

    spoil(math.nan)
    for name, buffer in model.named_buffers():
        assert buffer.equal(before[name]) != name.startswith("more.2"), name
    spoil(7.0)
    assert all((b == 7).all() for b in model.buffers() if b.is_floating_point())
