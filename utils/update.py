"""One update of the weights: micro-batches, loss scaling, clipping, and a step that can be skipped.

Pre-training, the linear probe and fine-tuning share it.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import mean_over_processes
from utils.errors import Diverged

LEVELS = ("auto", "O0", "O1", "O2", "bfloat16", "float16")
# the flags of a processor that has products of a type
KINDS = {"betas", "momentum"}  # settings that tell whose state an optimizer's is
FLAGS = {torch.bfloat16: {"amx_bf16", "avx512_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}


class Precision:
    """Autocast and, for float16 only, loss scaling.

    Args:
        level: O0 is float32, bfloat16 and float16 are autocast. O1 and O2 are autocast to
            bfloat16, but to float16 on a GPU that does not compute in bfloat16. auto becomes
            bfloat16 where the device computes in it, else float16 on a GPU, else O0.
        device: where it computes.
        tf32: allow TF32 products in the encoder, see ``allow_tf32``.

    Attributes:
        level: what auto became, else the level that was asked for.
        about: the type, and why, for the log.
        scaler: a GradScaler, disabled unless the type is float16.
        native: whether the device computes in the type, as it always does in float32.
        emulated: whether this processor emulates the type, which is slower than float32.
        tf32: whether the encoder's products may be TF32, which only newer GPUs have.

    Raises:
        ValueError: an unknown level.
    """

    def __init__(self, level: str, device: torch.device, tf32: bool = False) -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be {', '.join(LEVELS)}, got {level!r}")
        cuda, bfloat16 = device.type == "cuda", computes_in(torch.bfloat16, device)
        best = "bfloat16" if bfloat16 else "float16" if cuda else "O0"
        self.level = best if level == "auto" else level
        self.device_type = device.type
        self.enabled = self.level != "O0"
        half = self.level == "float16" or (self.level in ("O1", "O2") and cuda and not bfloat16)
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.native = not self.enabled or computes_in(self.dtype, device)
        self.emulated = not cuda and not self.native and processor_flags() is not None
        self.tf32 = tf32 and cuda and bfloat16  # GPUs got both together

        name = "this GPU" if cuda else "this processor"
        why = f"{name} computes in {'it' if bfloat16 else 'no bfloat16'}"
        why = f"auto, as {why}" if level == "auto" else f"AMP_OPT_LEVEL {level}"
        kind = str(self.dtype).removeprefix("torch.") if self.enabled else "float32"
        scaled = " with loss scaling" if half else ""
        self.about = f"{kind}{scaled} ({why})"
        if tf32:
            here = "TF32 products in the encoder alone" if self.tf32 else f"{name} has no TF32"
            self.about += f"; {here}"

    def autocast(self) -> torch.autocast:
        """The context for a forward pass."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the current GPU or the processor has products of bfloat16 or float16."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return not FLAGS[dtype].isdisjoint(processor_flags() or ())


def processor_flags(path: str = "/proc/cpuinfo") -> set[str] | None:
    """What Linux says that a processor can do, None for one that is not of the x86 kind."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return next((set(line.split()) for line in file if line.startswith("flags")), None)
    return None


def allow_tf32(encoder: nn.Module, precision: Precision) -> None:
    """Let ``encode`` use TF32 products for an encoder, if the precision has them."""
    marked: Any = encoder  # torch's types allow no attributes of other types
    marked.tf32 = precision.tf32


def encode(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features of images, (B, 3, H, W) -> (B, F).

    After ``allow_tf32`` the products of the encoder may be TF32, forward and backward. What is
    computed of the features, such as logits and loss, stays in float32, if all images of a
    backward pass are encoded before.
    """
    if not getattr(encoder, "tf32", False):
        return encoder(images)
    torch.set_float32_matmul_precision("high")
    try:
        features = encoder(images)
    finally:
        torch.set_float32_matmul_precision("highest")
    if features.requires_grad:
        features.register_hook(_allow_until_the_end)
    return features


def _allow_until_the_end(gradient: torch.Tensor) -> None:
    """Let the rest of a backward pass use TF32 products.

    Autograd goes back in the reverse order of the forward pass. So what came after the encoder is
    done when its features get their gradient.
    """
    torch.set_float32_matmul_precision("high")
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: torch.set_float32_matmul_precision("highest"))


@dataclass
class Forward:
    """What the forward pass of one micro-batch gives.

    Attributes:
        loss: the loss of each optimizer, (P,), or a scalar for a single one; with gradient.
        figures: what to report besides it, each of the shape of ``loss``, without gradient.
    """

    loss: torch.Tensor
    figures: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)


F = TypeVar("F", bound=Forward)


@dataclass(frozen=True)
class Result(Generic[F]):
    """What one update gives; everything stays on the device.

    Attributes:
        figures: ``loss``, the forward passes' own figures, both averaged over the micro-batches,
            ``grad_norm`` before clipping, and ``grad_norm_<part>``; (P,) or scalars.
        finite: for each optimizer whether its loss and gradient were finite; if not, it made no
            step. Of the shape of ``loss``.
        outputs: what each forward pass returned.
        longest_row: of each optimizer, how many updates in a row it has skipped at most so far.
    """

    figures: dict[str, torch.Tensor]
    finite: torch.Tensor
    outputs: list[F]
    longest_row: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))


class Update:
    """Makes updates; one whose loss or gradient is not finite is skipped, on every process.

    A skipped update leaves weights, optimizer, statistics of BatchNorm and queues as they were. A
    key encoder has moved by its momentum before, towards weights that then did not change: an undo
    would cost a copy of it.

    Several optimizers hold weights that do not depend on each other, such as the heads of a probe.
    Each is clipped and skipped by itself.

    Args:
        ddp: the model.
        optimizers: of its weights.
        precision: autocast, and the loss scaling of float16.
        clip: the largest norm of a gradient, 0 for any.
        parts: of a single optimizer's model: gradient norms are reported for each, by name.
        scale: whether float16 scales the losses; not where the weights compute only in float32.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizers: Sequence[torch.optim.Optimizer],
        precision: Precision,
        clip: float = 0.0,
        parts: dict[str, nn.Module] | None = None,
        scale: bool = True,
    ) -> None:
        self.ddp, self.optimizers, self.precision = ddp, list(optimizers), precision
        self.clip, self.parts = clip or math.inf, parts or {}
        owned = [{p for group in o.param_groups for p in group["params"]} for o in optimizers]
        # of each optimizer, in the model's order
        self.weights = [[p for p in ddp.parameters() if p in own] for own in owned]
        self._scales = scale and precision.scaler.is_enabled()
        # a scale of 1 changes no gradient, but lets the scaler skip a step; the fused optimizers
        # read on the device whether to, the others wait for it
        self.scaler = (
            precision.scaler
            if self._scales
            else torch.amp.GradScaler(precision.device_type, init_scale=1.0)
        )
        self._row = self._longest_row = torch.zeros((), dtype=torch.long)

    def __call__(self, micro_batches: Sequence[Any], forward: Callable[[Any], F]) -> Result[F]:
        """One update.

        Args:
            micro_batches: their gradients are averaged.
            forward: runs the model on one of them.
        """
        statistics = self._copy_statistics()
        outputs = []
        for number, batch in enumerate(micro_batches, 1):
            with nullcontext() if number == len(micro_batches) else self.ddp.no_sync():
                with self.precision.autocast():
                    output = forward(batch)
                loss = poisoned_if_not_finite(output.loss) / len(micro_batches)
                self.scaler.scale(loss.sum()).backward()
            output.loss = output.loss.detach()  # frees the graph
            outputs.append(output)

        norms = self._gradient_norms(outputs[0].loss)
        finite = norms["grad_norm"].isfinite()
        # Clipping multiplies the gradient, which may still be scaled, by limit / norm. Where the
        # norm is not finite it multiplies by NaN, and the scaler then skips the step.
        limits = torch.where(finite, norms["grad_norm"], math.nan).view(-1)
        for optimizer, weights, norm in zip(self.optimizers, self.weights, limits, strict=True):
            nn.utils.clip_grads_with_norm_(weights, self.clip, norm, foreach=True)
            self.scaler.step(optimizer)
        self.scaler.update(None if self._scales else 1.0)  # at 1 it stays
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._restore_statistics(statistics, finite)
        self._count_skipped(finite)

        reported = [{"loss": output.loss} | output.figures for output in outputs]
        means = {name: torch.stack([r[name] for r in reported]).mean(0) for name in reported[0]}
        return Result(means | norms, finite, outputs, self._longest_row)

    def check_skipped(
        self, most: int, advice: str, rows: Sequence[int] | None = None
    ) -> list[bool]:
        """Whether each optimizer skipped ``most`` updates in a row.

        Args:
            most: of TRAIN.MAX_SKIPPED_UPDATES.
            advice: the end of the error's message.
            rows: the longest rows, if they were read from the device; else it waits for them.

        Raises:
            Diverged: all did.
        """
        if rows is None:
            rows = self._longest_row.expand(len(self.optimizers)).tolist()
        if min(rows) >= most:
            raise Diverged(
                f"{min(rows)} updates in a row had a loss or gradient that is not finite (at most "
                f"TRAIN.MAX_SKIPPED_UPDATES {most}): {advice}"
            )
        return [row >= most for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """``optimizer``, as a single one with the groups of all, and ``scaler``."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            own, first = optimizer.state_dict(), sum(len(g["params"]) for g in groups)
            state |= {first + number: value for number, value in own["state"].items()}
            groups += [
                g | {"params": [first + n for n in g["params"]]} for g in own["param_groups"]
            ]
        scaler = self.scaler.state_dict() if self._scales else {}
        return {"optimizer": {"state": state, "param_groups": groups}, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` gave, but for the optimizers' settings, which stay as they are.

        Raises:
            KeyError, ValueError: the state of other optimizers.
        """
        groups = list(state["optimizer"]["param_groups"])
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            own, groups = groups[:count], groups[count:]
            numbers = [number for group in own for number in group["params"]]
            values = state["optimizer"]["state"]
            kept = {n: values[n] for n in numbers if n in values}
            present = optimizer.state_dict()["param_groups"]
            for group, now in zip(own, present, strict=True):
                if (kind := KINDS & set(group)) != (wanted := KINDS & set(now)):
                    raise ValueError(f"it has {sorted(kind)}, not {sorted(wanted)}")
            # the next update sets the rate, and what is configured holds for the rest
            settings = [now | {"params": g["params"]} for g, now in zip(own, present, strict=True)]
            optimizer.load_state_dict({"state": kept, "param_groups": settings})
            for parameter, entries in optimizer.state.items():
                for value in entries.values():
                    if torch.is_tensor(value) and value.shape not in ((), parameter.shape):
                        raise ValueError(f"{tuple(value.shape)} for {tuple(parameter.shape)}")
        if groups:
            raise ValueError(f"it has {len(groups)} groups of weights too many")
        if state["scaler"].keys() and self._scales:  # one of another precision has none
            self.scaler.load_state_dict(state["scaler"])

    def _gradient_norms(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """L2 norms of the unscaled gradients, of the shape of ``like``."""
        scale = self.scaler.scale(torch.ones((), device=like.device))
        if self.parts:
            norms = [_norm(part.parameters(), like.device) / scale for part in self.parts.values()]
            named = {f"grad_norm_{n}": v for n, v in zip(self.parts, norms, strict=True)}
            return {"grad_norm": torch.stack(norms).norm()} | named
        norms = [_norm(weights, like.device) / scale for weights in self.weights]
        return {"grad_norm": torch.stack(norms).view_as(like)}

    def _copy_statistics(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """The running statistics of all BatchNorms that train, by type, each type with a copy."""
        layers = [m for m in self.ddp.modules() if isinstance(m, _BatchNorm) and m.training]
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in (buffer for layer in layers for buffer in layer.buffers()):
            by_type.setdefault(buffer.dtype, []).append(buffer)
        return [(buffers, _joined(buffers)) for buffers in by_type.values()]

    @torch.no_grad()
    def _restore_statistics(
        self, copies: list[tuple[list[torch.Tensor], torch.Tensor]], finite: torch.Tensor
    ) -> None:
        finite = finite.all()
        if finite.device.type == "cpu" and finite:
            return  # on the CPU there is nothing to wait for
        for buffers, copy in copies:  # in one piece: an operator for each would be many launches
            kept = torch.where(finite, _joined(buffers), copy).split([b.numel() for b in buffers])
            torch._foreach_copy_(
                buffers, [k.view_as(b) for k, b in zip(kept, buffers, strict=True)]
            )

    def _count_skipped(self, finite: torch.Tensor) -> None:
        self._row = torch.where(finite, 0, self._row.to(finite.device) + 1)
        self._longest_row = torch.maximum(self._longest_row.to(finite.device), self._row)


class Averages:
    """Means of figures over updates and processes, without a synchronisation before ``read``.

    Skipped updates do not count in the means.

    Args:
        names: of the optimizers, each with figures of its own; a single one has an empty name.
    """

    def __init__(self, names: Sequence[str] = ("",)) -> None:
        self.names = names
        self._sums = torch.zeros(0)  # meaningless before the first update
        self._figures: tuple[str, ...] = ()
        self.updates = 0  # since the last reading, skipped ones included

    def add(self, figures: dict[str, torch.Tensor], finite: torch.Tensor) -> None:
        """Take the figures of one update, on the device; ``finite``: whether it was made."""
        self._figures = tuple(figures)
        values = torch.stack([finite.float(), *(v.float() for v in figures.values())])
        values = torch.where(finite, values, 0)
        self._sums = self._sums + values if self.updates else values
        self.updates += 1

    def read(self, also: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
        """The means, and ``skipped``, the number of skipped updates; then counting starts anew.

        Every process has to call it. The means are NaN if all updates were skipped.

        Args:
            also: values to read with them as they are, a scalar each or one for each optimizer.
        """
        also = also or {}
        sums = mean_over_processes(self._sums.clone()).view(-1, len(self.names))
        rows = [value.expand(len(self.names)).to(sums) for value in also.values()]
        columns = torch.cat([sums, torch.stack(rows)]) if rows else sums
        read: dict[str, float] = {}
        for name, (made, *totals) in zip(self.names, columns.T.tolist(), strict=True):
            as_they_are = totals[len(self._figures) :]
            means = [total / made if made else math.nan for total in totals[: len(self._figures)]]
            read |= {named(f, name): mean for f, mean in zip(self._figures, means, strict=True)}
            read[named("skipped", name)] = self.updates - round(made)
            read |= {named(f, name): v for f, v in zip(also, as_they_are, strict=True)}
        self.updates = 0
        return read


def named(figure: str, name: str) -> str:
    """What a figure of the optimizer ``name`` is called."""
    return f"{figure}@{name}" if name else figure


def poisoned_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` unchanged where it is finite; else NaN, and so are its gradients.

    Averaging the gradients then tells every process; the loss is known to one alone.
    """
    return loss * (1 + 0 * loss.detach())


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _norm(parameters: Any, device: torch.device) -> torch.Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients).to(device)
