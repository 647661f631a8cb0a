"""Synchronised BatchNorm against torch's on the batch of all processes, in one process.

Two processes with the same images stand in for any two: what they exchange is twice their own then,
and torch's BatchNorm gets the images twice. tests/utils/test_distributed.py has real ones.
"""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import models.batch_norm
from models.batch_norm import SyncBatchNorm, has_batch_norm, synchronize_batch_norm

CPU = torch.device("cpu")


@pytest.fixture
def two_alike(monkeypatch):
    """Two processes that hold the same."""
    exchanged = []
    monkeypatch.setattr(models.batch_norm, "world_size", lambda: 2)
    monkeypatch.setattr(
        models.batch_norm,
        "all_gather_rows",
        lambda x: exchanged.append(x.shape[1:]) or torch.cat([x, x]),
    )
    monkeypatch.setattr(
        models.batch_norm.dist, "all_reduce", lambda x: exchanged.append(x.shape) or x.mul_(2)
    )
    return exchanged


def randomised(layer: nn.Module) -> nn.Module:
    """With weights, biases and statistics that are not those of a new layer."""
    generator = torch.Generator().manual_seed(3)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def assert_alike(ours: nn.Module, plain: nn.Module, x: torch.Tensor, direction: torch.Tensor):
    """Outputs, gradients and statistics of three updates; ``plain`` gets everything twice."""
    for number in range(3):
        own, twice = (t.detach().clone().requires_grad_() for t in (x + number, x + number))
        for layer in (ours, plain):
            layer.zero_grad()
        y = ours(own)
        expected = plain(torch.cat([twice, twice]))[: len(x)]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        # the loss of one process; each of the two adds as much to the statistics' gradient
        (y * direction).sum().backward()
        (expected * direction).sum().backward()
        for name, parameter in ours.named_parameters():
            wanted = dict(plain.named_parameters())[name].grad
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=3e-5)
        for name, buffer in ours.named_buffers():
            wanted = dict(plain.named_buffers())[name]
            torch.testing.assert_close(buffer, wanted, rtol=1e-5, atol=1e-6)
        # what reaches the images through the shared statistics counts for both processes
        both = torch.cat([x + number] * 2).requires_grad_()
        copy = nn.BatchNorm1d(x.shape[-1], eps=plain.eps) if x.ndim == 2 else None
        if copy is not None:
            copy.load_state_dict(plain.state_dict())
            (copy(both) * torch.cat([direction] * 2)).sum().backward()
            torch.testing.assert_close(own.grad, both.grad[: len(x)], rtol=1e-4, atol=1e-5)


def test_rows_of_two_processes_are_normalised_as_one_batch(two_alike):
    x, direction = torch.randn(2, 5, 7)
    x = x + torch.arange(7.0)
    ours, plain = randomised(SyncBatchNorm(7)), randomised(nn.BatchNorm1d(7))
    assert_alike(ours, plain, x, direction)
    assert set(two_alike) == {(2, 7)} and len(two_alike) == 3 * 2  # one in each direction


def test_one_image_a_process_is_enough(two_alike):
    ours, plain = SyncBatchNorm(3), nn.BatchNorm1d(3)
    x = torch.tensor([[1.0, 2.0, 5.0]])
    ours(x), plain(torch.cat([x, x]))
    torch.testing.assert_close(ours.running_var, plain.running_var)
    assert ours(x).isfinite().all()


def test_images_of_two_processes_and_what_timm_does_behind(two_alike):
    plain = randomised(BatchNormAct2d(4, eps=1e-3))
    ours = synchronize_batch_norm(nn.Sequential(copy.deepcopy(plain)), CPU)[0]
    assert isinstance(ours, SyncBatchNorm) and ours.eps == 1e-3
    x, direction = torch.randn(2, 3, 4, 5, 6)
    assert_alike(ours, plain, x, direction)
    assert (ours(x) >= 0).all() and (ours(x) == 0).any()  # the activation


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d])
def test_what_a_layer_has_learned_stays(two_alike, kind):
    """Weights, statistics and the count of batches, when it is synchronised."""
    plain = randomised(kind(4))
    plain.num_batches_tracked += 7
    ours = synchronize_batch_norm(nn.Sequential(copy.deepcopy(plain)), CPU)[0]
    assert isinstance(ours, SyncBatchNorm)
    for name, value in plain.state_dict().items():
        assert ours.state_dict()[name].equal(value), name


def test_eval_mode_uses_the_running_statistics(two_alike):
    ours, plain = (randomised(kind(6)).eval() for kind in (SyncBatchNorm, nn.BatchNorm1d))
    x = torch.randn(2, 4, 6)
    expected = plain(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(ours(x), expected)
    assert not two_alike and ours.num_batches_tracked == 0


def test_alone_it_is_torchs_own(monkeypatch):
    def refuse(x):
        raise AssertionError("nothing to exchange")

    monkeypatch.setattr(models.batch_norm, "all_gather_rows", refuse)
    ours, plain = randomised(SyncBatchNorm(6)), randomised(nn.BatchNorm1d(6))
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(ours(x), plain(x.flatten(0, 1)).view_as(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)
    own = synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), CPU)[0]
    assert type(own) is nn.BatchNorm2d  # one process needs no other kind


def test_types_and_modes_stay(two_alike):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(3), nn.Sequential(SyncBatchNorm(4)))
    model[1].weight.requires_grad_(False)
    own = model[2][0]
    model.eval()
    made = synchronize_batch_norm(model, CPU)
    assert made is model and made[2][0] is own and type(made[0]) is nn.Linear
    assert isinstance(made[1], SyncBatchNorm) and not made[1].training
    assert not made[1].weight.requires_grad and made[1].bias.requires_grad
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert own.train()(x).dtype == torch.bfloat16


def test_who_mixes_images():
    assert has_batch_norm(nn.Sequential(nn.Sequential(nn.BatchNorm2d(2))))
    assert has_batch_norm(SyncBatchNorm(2))
    assert not has_batch_norm(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))
