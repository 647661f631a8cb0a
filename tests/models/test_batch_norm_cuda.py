"""BatchNorm of all processes as GPUs compute it, in two processes of gloo on the CPU.

Its kernels run only on GPUs. Here plain formulas stand in for them; that they say what the kernels
compute is held by torch's own SyncBatchNorm, which must give one process's values with them too.
"""

import pytest
import torch
from helpers import spawn
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchsOwn

from models.batch_norm import SyncBatchNorm, synchronize_batch_norm
from utils.distributed import mean_over_processes, rank

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def across(x: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    return statistic.view(-1, *[1] * (x.ndim - 2))


def dims(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def stats(x, eps):
    var, mean = torch.var_mean(x.double(), dims(x), correction=0)
    return mean.float(), (var + eps).rsqrt().float()


def gather_stats(x, means, deviations, running_mean, running_var, momentum, eps, counts):
    means, deviations, counts = means.double(), deviations.double(), counts.double()[:, None]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    second = (deviations**-2 - eps + means**2) * counts
    var = second.sum(0) / total - mean**2
    running_mean.lerp_(mean.float(), momentum)
    running_var.lerp_((var * total / (total - 1)).float(), momentum)
    return mean.float(), (var + eps).rsqrt().float()


def elemt(x, weight, bias, mean, deviation, eps):
    y = (x.float() - across(x, mean)) * across(x, deviation)
    if weight is not None:
        y = y * across(x, weight) + across(x, bias)
    return y.to(x.dtype)


def backward_reduce(gradient, x, mean, deviation, weight, of_x, of_weight, of_bias):
    gradient = gradient.float()
    sum_dy = gradient.sum(dims(x))
    sum_dy_xmu = (gradient * (x.float() - across(x, mean))).sum(dims(x))
    weight_too = sum_dy_xmu * deviation if of_weight else None
    return sum_dy, sum_dy_xmu, weight_too, sum_dy.clone() if of_bias else None


def backward_elemt(gradient, x, mean, deviation, weight, sum_dy, sum_dy_xmu, counts):
    total = counts.sum()
    scale = deviation if weight is None else deviation * weight
    centered = x.float() - across(x, mean)
    slope = across(x, deviation**2 * sum_dy_xmu / total)
    inner = gradient.float() - across(x, sum_dy / total) - centered * slope
    return (inner * across(x, scale)).to(x.dtype)


STAND_INS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


def torchs_forward(self, x: torch.Tensor) -> torch.Tensor:
    """``SyncBatchNorm._forward_cuda`` by torch's own."""
    rows = x.reshape(-1, self.num_features) if self.channels == -1 else x
    self.num_batches_tracked.add_(1)
    statistics = self.running_mean, self.running_var, self.eps, self.momentum
    world = torch.distributed.group.WORLD
    return TorchsOwn.apply(rows, self.weight, self.bias, *statistics, world, 2).view_as(x)


FORMS = {"gloo": None, "torch": torchs_forward, "ours": SyncBatchNorm._forward_cuda}
CASES = {
    "rows": (lambda: SyncBatchNorm(5), (6, 5)),
    "one row a process": (lambda: SyncBatchNorm(5), (2, 5)),
    "tokens": (lambda: SyncBatchNorm(5), (4, 3, 5)),
    "images": (lambda: BatchNormAct2d(5, eps=1e-3), (4, 5, 3, 2)),
    "images, channels last": (lambda: nn.BatchNorm2d(5), (4, 5, 3, 2)),
    "without weights": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 3, 2)),
    "a weight that does not learn": (lambda: nn.BatchNorm2d(5), (4, 5, 3, 2)),
}


def build(case: str) -> nn.Sequential:
    """A layer whose weights and statistics are not those of a new one."""
    torch.manual_seed(3)
    layer = CASES[case][0]()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    if case == "a weight that does not learn":
        layer.weight.requires_grad_(False)
    return nn.Sequential(layer)


def updates(case: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and gradients of three updates of both processes."""
    torch.manual_seed(4)
    pairs = torch.randn(3, 2, *CASES[case][1]) + 0.5
    if case.endswith("channels last"):
        return [tuple(t.to(memory_format=torch.channels_last) for t in pair) for pair in pairs]
    return [tuple(pair) for pair in pairs]


def follow(model: nn.Module, pairs: list) -> dict[str, torch.Tensor]:
    """Outputs, gradients and statistics of the updates."""
    found = {}
    for number, (x, direction) in enumerate(pairs):
        model.zero_grad()
        x = (x * (1 + number)).requires_grad_()
        y = model(x)
        (y * direction).sum().backward()
        found |= {f"y{number}": y.detach(), f"x{number}": x.grad}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[f"{name} {number}"] = parameter.grad.clone()
            else:
                assert parameter.grad is None
        found |= {f"{name} {number}": b.clone() for name, b in model.named_buffers()}
    return found


def in_part(_, folder: str) -> None:
    library = torch.library.Library("aten", "IMPL")
    for name, function in STAND_INS.items():
        library.impl(name, function, "CPU")
    for form, function in FORMS.items():
        if function:
            SyncBatchNorm.forward = function
        for case in CASES:
            model = synchronize_batch_norm(build(case), CPU)
            assert isinstance(model[0], SyncBatchNorm)
            own = [tuple(t.chunk(2)[rank()] for t in pair) for pair in updates(case)]
            found = follow(model, own)
            for name, value in found.items():
                if "weight" in name or "bias" in name:  # as DDP does, but for the mean
                    found[name] = 2 * mean_over_processes(value)
            torch.save(found, f"{folder}/{form} {case} {rank()}.pth")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    spawn(in_part, 2, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_give_the_values_of_one(found, form, case):
    """The form for GPUs, torch's own and that of gloo: forward, backward, statistics."""
    alone = follow(build(case), updates(case))
    parts = [torch.load(found / f"{form} {case} {r}.pth") for r in (0, 1)]
    assert parts[0].keys() == alone.keys()
    for name, value in alone.items():
        split = name[0] in "xy"
        ours = torch.cat([p[name] for p in parts]) if split else parts[0][name]
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        assert split or parts[1][name].equal(parts[0][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_stand_ins_say_what_the_kernels_compute(form):
    torch.manual_seed(5)
    x, gradient = (t.to(memory_format=form) for t in torch.randn(2, 4, 5, 3, 2) + 0.5)
    weight, bias, mean, var = torch.rand(4, 5) + 0.5
    counts = torch.full((2,), 24.0)
    gathered = torch.rand(2, 5), torch.rand(2, 5) + 0.5

    def both(name: str, *given):
        on_gpu = [t.cuda() if torch.is_tensor(t) else t for t in given]
        ours, kernels = STAND_INS[name](*given), getattr(torch, name)(*on_gpu)
        found = [t if torch.is_tensor(t) else list(t) for t in (ours, kernels)]
        torch.testing.assert_close(*found, check_device=False, rtol=1e-4, atol=1e-5)
        for own, other in zip(given, on_gpu, strict=True):  # what changes in place
            torch.testing.assert_close(own, other, check_device=False, rtol=1e-4, atol=1e-5)

    both("batch_norm_stats", x, 1e-5)
    both("batch_norm_gather_stats_with_counts", x, *gathered, mean, var, 0.1, 1e-5, counts)
    both("batch_norm_elemt", x, weight, bias, mean, var, 1e-5)
    both("batch_norm_backward_reduce", gradient, x, mean, var, weight, True, True, True)
    sums = torch.randn(2, 5)
    both("batch_norm_backward_elemt", gradient, x, mean, var, weight, *sums, counts.int())
