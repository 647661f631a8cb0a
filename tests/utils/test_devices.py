"""Which GPU a process takes, and what is said of one that it cannot use; without any GPU."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import spawn

from utils import group
from utils.distributed import init_process_group
from utils.errors import UserError
from utils.group import interface_to
from utils.launchers import Place

BUSY = "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be"
FULL = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 1 has a total capacity of 15.0 GiB"


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, and what was asked of torch: ``gpus.fail`` is what the first use of one says."""
    seen = SimpleNamespace(fail=None, groups=[], device=None)
    real = torch.zeros

    def zeros(*shape, device=None, **more):
        if device is not None and seen.fail:
            raise seen.fail
        return real(*shape, **more)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(seen, "device", device))
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *given, **more: seen.groups.append((given, more))
    )
    return seen


def test_nccl_is_told_its_gpu_and_left_to_torchs_defaults(gpus, monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    device = init_process_group(1)
    assert device == gpus.device == torch.device("cuda", 1)
    ((backend,), more), *others = gpus.groups
    assert (backend, more["device_id"], others) == ("nccl", device, [])
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_of_several_too(gpus, monkeypatch):
    monkeypatch.setattr(group, "Peers", lambda timeout: None)
    monkeypatch.setattr(group, "interface_to", lambda *place: None)
    monkeypatch.setattr(group, "read_place", lambda: Place(0, 2, "localhost", 1))
    monkeypatch.setattr(group, "_connect", lambda place, timeout: "store")
    group.form_group("nccl", 5, device_id=torch.device("cuda", 0))
    ((_, more),) = gpus.groups
    assert more["device_id"] == torch.device("cuda", 0) and more["world_size"] == 2


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (2, None, "LOCAL_RANK is 2, but this process sees 2 GPUs: start at most one process"),
        (1, RuntimeError(BUSY), r"GPU 1: cannot be used, .* choose another .* \(CUDA error: all"),
        (0, torch.OutOfMemoryError(FULL), r"GPU 0: cannot be used, end what .*\(CUDA out of"),
    ],
)
def test_a_gpu_that_is_not_there_busy_or_full_is_one_line(gpus, number, error, said):
    gpus.fail = error
    with pytest.raises(UserError, match=f"^{said}") as raised:
        init_process_group(number)
    assert "\n" not in str(raised.value) and not gpus.groups


@pytest.mark.parametrize(
    ("address", "name"),
    [("localhost", "lo"), ("127.0.0.1", "lo"), ("no.such.host.invalid", None), ("::1", None)],
)
def test_the_interface_that_leads_to_an_address(address, name):
    assert interface_to(address, 29500) == name


def test_a_machine_that_takes_its_name_for_its_loopback_states_none(monkeypatch):
    """As /etc/hosts of Debian does: the other machines cannot reach that."""
    monkeypatch.setattr(group.socket, "socket", Loopback)
    assert interface_to("node1", 29500) is None


class Loopback(contextlib.nullcontext):
    def __init__(self, *kind) -> None:
        super().__init__(self)

    def connect(self, place) -> None:
        pass

    def getsockname(self):
        return "127.0.1.1", 0


def stated(_, name: str) -> None:
    assert os.environ["GLOO_SOCKET_IFNAME"] == name


@pytest.mark.slow
def test_a_group_goes_by_the_interface_of_its_store(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    spawn(stated, 2, "lo")
