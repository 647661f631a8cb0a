"""Two gloo processes against one process with a batch of twice the size."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, spawn
from torch import nn

import utils.distributed
from data.loader import normalize
from evaluation.features import extract_features
from models.batch_norm import SyncBatchNorm, synchronize_batch_norm
from models.byol import BYOL
from models.encoder import create_encoder
from models.moby import MoBY
from models.synco import SynCo
from utils.distributed import all_gather_batch, data_parallel, mean_over_processes, rank, world_size
from utils.update import Precision

pytestmark = pytest.mark.slow


def build(name: str, layer_norm: bool = True):
    torch.manual_seed(0)
    encoders = [create_encoder("vit_nano", 32, replace_ln_with_bn=not layer_norm) for _ in "qk"]
    if name == "byol":
        return BYOL(*encoders)
    if name == "moby":
        return MoBY(*encoders, num_negatives=10)
    return SynCo(*encoders, num_negatives=10, n_hard=4, counts=(0,) * 6, warmup_epochs=0)


def train(method, views: torch.Tensor, parallel) -> dict[str, torch.Tensor]:
    """Three updates on views (3, 2, B, ...); the loss, gradients and buffers of the last."""
    for view1, view2 in views:
        method.update_key_encoder(0.9)
        method.zero_grad()
        output = parallel(view1, view2, 1)
        output.loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        method.enqueue(*output.keys, torch.tensor(True))
    state = {"loss": mean_over_processes(output.loss.detach())}
    state |= {f"grad.{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    return state | {n: b.clone() for n, b in method.named_buffers()}


def halves(_, folder: str, name: str, layer_norm: bool) -> None:
    views = torch.load(f"{folder}/views.pth")
    method = synchronize_batch_norm(build(name, layer_norm), torch.device("cpu"))
    own = views[:, :, rank() * 3 : rank() * 3 + 3]
    state = train(method, own, data_parallel(method, torch.device("cpu")))
    torch.save(state, f"{folder}/state{rank()}.pth")


@pytest.mark.parametrize(
    ("name", "layer_norm"), [("byol", True), ("moby", True), ("synco", True), ("moby", False)]
)
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, name, layer_norm):
    torch.manual_seed(0)
    views = torch.randn(3, 2, 6, 3, 32, 32)
    torch.save(views, tmp_path / "views.pth")
    spawn(halves, 2, str(tmp_path), name, layer_norm)
    states = [torch.load(tmp_path / f"state{r}.pth") for r in (0, 1)]
    method = build(name, layer_norm)
    alone = train(method, views, method)
    for key, value in alone.items():
        assert states[0][key].equal(states[1][key]), key
        torch.testing.assert_close(
            states[0][key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    if name != "byol":
        assert int(alone["queue_ptr"]) == 8  # 3 x 6 keys around a queue of 10


def normalise_parts(_, folder: str) -> None:
    layer, rows = torch.load(f"{folder}/in.pth", weights_only=False)
    own = rows.chunk(2)[rank()].requires_grad_()
    output = layer(own)
    (output * torch.arange(1.0, 5.0)).square().sum().backward()
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
    gradients = [own.grad, layer.weight.grad, layer.bias.grad]
    torch.save((output, gradients, layer.state_dict()), f"{folder}/out{rank()}.pth")


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    """Outputs, input and parameter gradients, and statistics, against torch's own."""
    torch.manual_seed(0)
    layer, plain = SyncBatchNorm(4), nn.BatchNorm1d(4)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    plain.load_state_dict(layer.state_dict())
    rows = 5 + 3 * torch.randn(8, 4)
    torch.save((layer, rows), tmp_path / "in.pth")
    spawn(normalise_parts, 2, str(tmp_path))

    rows.requires_grad_()
    expected = plain(rows)
    (expected * torch.arange(1.0, 5.0)).square().sum().backward()
    parts = [torch.load(tmp_path / f"out{r}.pth") for r in (0, 1)]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), expected, **close)
    torch.testing.assert_close(torch.cat([p[1][0] for p in parts]), rows.grad, **close)
    for _, gradients, state in parts:
        torch.testing.assert_close(gradients[1:], [plain.weight.grad, plain.bias.grad], **close)
        torch.testing.assert_close(state, plain.state_dict(), **close)


class Numbered(torch.utils.data.Dataset):
    """Images whose every value is their number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return torch.full((3, 2, 2), index, dtype=torch.uint8), 100 + index


class Mean(nn.Module):
    def forward(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], 1)


def extract(_, folder: str) -> None:
    device = torch.device("cpu")
    run = SimpleNamespace(device=device, precision=Precision("O0", device))
    results = []
    for length in (1, 2, 7, 12):
        options = {"batch_size": 2, "num_workers": 0, "normalize": False}
        results.append(extract_features(Mean(), Numbered(length), run, **options))
    torch.save(results, f"{folder}/features{rank()}.pth")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_is_encoded_in_order(tmp_path, processes):
    """Also with fewer images than processes, and a part that no batch divides."""
    spawn(extract, processes, str(tmp_path))
    for r in range(processes):
        for length, parts in zip(
            (1, 2, 7, 12), torch.load(tmp_path / f"features{r}.pth"), strict=True
        ):
            images = torch.stack([Numbered(length)[i][0] for i in range(length)])
            torch.testing.assert_close(parts[0], Mean()(normalize(images)))
            assert parts[1].tolist() == list(range(100, 100 + length))


def gathered_by_both(_, folder: str) -> None:
    torch.manual_seed(rank())
    found = {}
    for number, shape in enumerate([(3, 5), (1, 256), (4,)]):
        for dtype in (torch.float32, torch.float64, torch.int64):
            own = (100 * torch.randn(shape)).to(dtype)
            parts = [torch.empty_like(own) for _ in range(world_size())]
            dist.all_gather(parts, own)
            found[number, dtype] = all_gather_batch(own), torch.cat(parts)
    # a tensor with a gradient gives one without
    assert not all_gather_batch(torch.ones(2, 2, requires_grad=True) * 2).requires_grad
    assert utils.distributed.gather.__module__ == "diffdist.functional"
    torch.save(list(found.values()), f"{folder}/{rank()}.pth")


def test_keys_are_gathered_as_torch_does(tmp_path):
    """Bit for bit, in the order of ranks, on every process alike."""
    spawn(gathered_by_both, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pth") for r in (0, 1))
    for (ours, torchs), (others, _) in zip(first, second, strict=True):
        assert ours.equal(torchs) and ours.equal(others) and ours.dtype == torchs.dtype
    assert len(first) == 9


def test_torch_gathers_where_diffdist_does_not_import():
    program = (
        "import sys\nsys.modules['diffdist'] = sys.modules['diffdist.functional'] = None\n"
        "import torch.distributed as dist\nimport utils.distributed\n"
        "assert utils.distributed.gather is dist.all_gather\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0
