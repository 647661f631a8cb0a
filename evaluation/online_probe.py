"""A linear classifier that learns on the encoder's features while the encoder is pre-trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data.source import ImageSource
from models.momentum import Output
from utils.distributed import world_size
from utils.errors import UserError

RATE, MOMENTUM = 0.1, 0.9  # of its SGD


class OnlineProbe:
    """One linear layer on the standardised features of both views, learned by SGD.

    No gradient reaches the encoder, and no random number is drawn: the layer starts from zeros.
    So the pre-training is the same with and without it. Features are standardised within each
    micro-batch of a process, because their scale changes as the encoder learns.

    Args:
        width: of the features.
        source: the training images, with labels.
        device: where it learns.

    Raises:
        UserError: images without classes, or with several classes each.
    """

    def __init__(self, width: int, source: ImageSource, device: torch.device) -> None:
        if len(source.classes) < 2 or np.ndim(source.labels) > 1:
            raise UserError("TRAIN.PROBE needs images with one class each: set it to False")
        shape = len(source.classes), width + 1  # the last column is the bias
        self.weight = torch.zeros(shape, device=device)
        self.velocity = torch.zeros(shape, device=device)
        self._gradients: list[torch.Tensor] = []

    def learning(self, forward: Callable[[Any], Output]) -> Callable[[Any], Output]:
        """``forward``, after which the probe learns from the features and the batch's labels.

        The figure ``probe`` joins those of the output: the share of the views that the probe
        classified before it learned from them, from 0 to 1.
        """

        def run(batch: Any) -> Output:
            output = forward(batch)
            with torch.autocast(output.loss.device.type, enabled=False), torch.no_grad():
                output.figures["probe"] = self._learn(output.features, batch.label)
            return output

        return run

    def _learn(self, features: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([_standardise(view.float()) for view in features])  # 2Bx(F+1)
        labels = labels.to(inputs.device, non_blocking=True).repeat(len(features))
        logits = inputs @ self.weight.T
        # the gradient of the mean cross entropy
        errors = logits.softmax(1) - F.one_hot(labels, len(self.weight))
        self._gradients.append(errors.T @ inputs / len(inputs))
        return (logits.argmax(1) == labels).float().mean()

    def step(self, finite: torch.Tensor) -> None:
        """Learn from the micro-batches since the last step; every process calls it.

        Args:
            finite: whether the encoder's update was made, a bool on the device; if not, the probe
                stays as it is.
        """
        gradient = torch.stack(self._gradients).mean(0)
        self._gradients = []
        dist.all_reduce(gradient)
        velocity = MOMENTUM * self.velocity + gradient / world_size()
        self.velocity.copy_(torch.where(finite, velocity, self.velocity))
        weight = self.weight - RATE * self.velocity
        self.weight.copy_(torch.where(finite, weight, self.weight))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weight and velocity."""
        return {"weight": self.weight, "velocity": self.velocity}

    def load_state_dict(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Take the state in the checkpoint that was read from ``path``, if it has one.

        Raises:
            UserError: it belongs to another encoder or to other classes.
        """
        if "probe" not in checkpoint:
            return  # the run began without
        try:
            for name, tensor in self.state_dict().items():
                tensor.copy_(checkpoint["probe"][name])
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: the state of another TRAIN.PROBE ({error})") from error


def _standardise(features: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the batch, (B, F) -> (B, F + 1), with a column of ones."""
    deviation, mean = torch.std_mean(features, 0, correction=0)
    return F.pad((features - mean) / (deviation + 1e-6), (0, 1), value=1.0)
