"""Plain forms of what this project computes faster: the measure of python -m tools.benchmark.

Eager, float32, one thing after the other, as one would write it on a first reading of the papers.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.augmentation import Augmentation, apply_view, draw_view
from data.image import decode_rgb
from models.synco import Draws, SynCo


class PlainSynCo(SynCo):
    """SynCo that passes each view by itself, builds its negatives, and averages in a loop."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.views_apart = True
        for name in ("queue1", "queue2"):  # as one would write dim x K
            setattr(self, name, getattr(self, name).contiguous())

    @staticmethod
    def _encode(encoder: nn.Module, images: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(encoder(image) for image in images)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """One parameter at a time."""
        momentum_loop(self.encoder, self.encoder_k, momentum)
        momentum_loop(self.projector, self.projector_k, momentum)

    @torch.no_grad()
    def draw(self, similarity: torch.Tensor, dim: int) -> Draws:
        """One call for each type and kind of number."""
        batch, hard = len(similarity), similarity.topk(self.n_hard, dim=1).indices
        columns = [
            hard.gather(1, torch.randint(self.n_hard, (batch, n), device=hard.device))
            for n in (*self.counts, self.counts[2])
        ]
        uniform = [torch.rand(batch, n, device=hard.device) for n in self.counts[:3]]
        normal = torch.randn(batch, self.counts[3], dim, device=hard.device)
        return Draws(columns, uniform, normal)

    def synthetic(
        self, q: torch.Tensor, similarity: torch.Tensor, queue: torch.Tensor, draws: Draws
    ) -> list[torch.Tensor]:
        """The negatives as unit vectors, B x N_i x dim each, and their products with q."""
        n = [queue.T[columns] for columns in draws.columns]
        query = q.detach()[:, None]
        a, b, g = (
            (low + (high - low) * u)[..., None]
            for (low, high), u in zip(
                (self.alpha, self.beta, self.gamma), draws.uniform, strict=True
            )
        )
        vectors = [
            a * query + (1 - a) * n[0],
            query + b * (n[1] - query),
            g * n[2] + (1 - g) * n[6],
            n[3] + self.sigma * draws.normal,
            n[4] + self.delta * similarity_gradients(query, n[4]),
            n[5] + self.eta * similarity_gradients(query, n[5]).sign(),
        ]
        return [(q[:, None] * F.normalize(v, dim=2)).sum(2) for v in vectors]


def similarity_gradients(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The gradient of q.n with respect to each n, by one call of autograd for each negative."""
    gradients = []
    with torch.enable_grad():
        for key in keys.unbind(1):
            key = key.detach().requires_grad_()
            gradients.append(torch.autograd.grad((query[:, 0] * key).sum(), key)[0])
    return torch.stack(gradients, 1)


@torch.no_grad()
def momentum_loop(online: torch.nn.Module, keys: torch.nn.Module, momentum: float) -> None:
    """Move the parameters of ``keys`` towards those of ``online``, one at a time."""
    for p, p_k in zip(online.parameters(), keys.parameters(), strict=True):
        p_k.data = p_k.data * momentum + p.data * (1 - momentum)


def pil_views(
    content: bytes, augmentations: tuple[Augmentation, ...], size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Decode and draw views with PIL and torchvision, one operation after the other."""
    image = decode_rgb(content, "image")
    return [apply_view(image, draw_view(rng, *image.size, a), size) for a in augmentations]
