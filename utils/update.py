"""Updates with a loss or gradient that is not finite leave no trace, on all processes alike."""

from typing import Any

import torch
from torch import nn


class Precision:
    """Autocast and, for float16 only, loss scaling.

    O0 is float32. O1 and O2 are autocast to bfloat16 where the device computes in it, else to
    float16 with a GradScaler.

    Attributes:
        scaler: a GradScaler, disabled unless the type is float16.
        emulated: whether this processor computes bfloat16 by other means, slower than float32.
    """

    def __init__(self, level: str, device: torch.device) -> None:
        if level not in ("O0", "O1", "O2"):
            raise ValueError(f"level must be O0, O1 or O2, got {level!r}")
        self.device_type = device.type
        self.enabled = level != "O0"
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.enabled and self.dtype == torch.float16
        )

        known: dict[str, bool] = (
            getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        )
        kinds = [known[name] for name in ("avx512_bf16", "amx_bf16") if name in known]
        self.emulated = self.enabled and bool(kinds) and not any(kinds)

    def autocast(self) -> torch.autocast:
        """The context for a forward pass."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)


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
