"""Updates with a loss or gradient that is not finite leave no trace, on all processes alike."""

from typing import Any

import torch
from torch import nn


def poisoned_with(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` unchanged if it is finite; else NaN, and so are its gradients.

    Averaging the gradients then tells every process, which the loss of one does not.
    """
    return loss * (1 + 0 * loss.detach())


def step_if_finite(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Let the optimizer make its step if ``finite``, a bool on the device, is true.

    The fused optimizers read it on the device; others, and the first step, which makes their
    state, wait for it.
    """
    if optimizer.defaults.get("fused") and optimizer.state:
        fused: Any = optimizer  # torch declares neither of the two that it reads
        fused.grad_scale, fused.found_inf = None, (~finite).float()
        optimizer.step()
        del fused.grad_scale, fused.found_inf
    elif finite:
        optimizer.step()


def copy_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Queues and statistics of BatchNorm as they are."""
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def restore_buffers(model: nn.Module, copies: list[torch.Tensor], finite: torch.Tensor) -> None:
    """Put the copies back unless ``finite``, a bool on the device, is true."""
    if finite.device.type == "cpu" and finite:
        return  # nothing to wait for
    for buffer, copy in zip(model.buffers(), copies, strict=True):
        buffer.copy_(torch.where(finite, buffer, copy))


class SkippedInARow:
    """Counts updates that were skipped one after the other, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._now = torch.zeros((), dtype=torch.long, device=device)
        self._most = self._now.clone()

    def add(self, finite: torch.Tensor) -> None:
        """Take whether an update was made, a bool on the device."""
        self._now = torch.where(finite, 0, self._now + 1)
        self._most = torch.maximum(self._most, self._now)

    def most(self) -> int:
        """The longest row so far; waits for the device."""
        return int(self._most)


def gradient_norms(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """L2 norm of all gradients, ``grad_norm``, and ``grad_norm_<name>`` of each part.

    Scalars on the device; nothing waits for it.
    """
    gradients = {
        n: [p.grad for p in m.parameters() if p.grad is not None] for n, m in parts.items()
    }
    device = next(p.device for m in parts.values() for p in m.parameters())
    norms = torch.stack([torch.nn.utils.get_total_norm(g).to(device) for g in gradients.values()])
    names = [f"grad_norm_{name}" for name in parts]
    return {"grad_norm": norms.norm(), **dict(zip(names, norms, strict=True))}
