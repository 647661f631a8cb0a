"""Label propagation by the affinity of patches, the video protocol of DINO (arXiv 2104.14294)."""

from collections import deque
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK = 2**25  # similarities at a time: 128 MiB, and a 480p grid of 16-pixel patches at once


class LabelPropagation:
    """Carries soft labels from frame to frame.

    The context of a frame is the first frame and the ones just before it. Nothing else is kept.

    Args:
        features: of the first frame, (h, w, C).
        labels: of the first frame, (h, w, K), a one-hot vector for each patch.
        n_last_frames: frames of the context besides the first.
        radius: rows and columns that a label may move, None for any.
        topk: patches of the context that a patch takes its label from.
        temperature: of the affinity exp(cosine / temperature).

    Source: DINO, section 4.2.3 and its published evaluation.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        n_last_frames: int = 7,
        radius: int | None = 12,
        topk: int = 5,
        temperature: float = 0.1,
    ) -> None:
        self.first = F.normalize(features, dim=2), labels
        self.recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=n_last_frames)
        self.radius, self.topk, self.temperature = radius, topk, temperature

    def step(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the next frame, (h, w, C) -> its soft labels, (h, w, K)."""
        features = F.normalize(features, dim=2)
        context = [self.first, *self.recent]
        labels = propagate(
            features,
            torch.stack([frame for frame, _ in context], 1),
            torch.stack([known for _, known in context], 1),
            self.radius,
            self.topk,
            self.temperature,
        )
        self.recent.append((features, labels))
        return labels


def propagate(
    target: torch.Tensor,
    sources: torch.Tensor,
    labels: torch.Tensor,
    radius: int | None,
    topk: int,
    temperature: float,
) -> torch.Tensor:
    """Labels of a frame, averaged over the most similar patches of n others.

    Args:
        target: (h, w, C), L2-normalised along C.
        sources: (h, n, w, C), likewise.
        labels: (h, n, w, K).
        radius, topk, temperature: see ``LabelPropagation``.

    Returns:
        (h, w, K).
    """
    height, width, _ = target.shape
    reach = max(height, width) if radius is None else radius
    outside = outside_neighborhood(height, width, reach, target.device)
    propagated = []
    count = max(1, BLOCK // (width * sources.shape[:3].numel()))
    for top in range(0, height, count):
        rows = target[top : top + count].flatten(0, 1)  # txC
        near = slice(max(0, top - reach), top + count + reach)
        similarity = rows @ sources[near].flatten(0, 2).T  # txs
        blocked = outside[top : top + count, :, near, None]  # rows x w x near x 1 x w
        similarity.view(-1, width, blocked.shape[2], sources.shape[1], width).masked_fill_(
            blocked, -torch.inf
        )
        best = similarity.topk(min(topk, similarity.shape[1]), dim=1).values
        # patches as similar as the last of the best count too
        similarity.masked_fill_(similarity < best[:, -1:], -torch.inf)
        # the softmax is exp(cosine / temperature), normalised
        weights = similarity.div_(temperature).softmax(1)
        propagated.append(weights @ labels[near].flatten(0, 2))  # txK
    return torch.cat(propagated).view(height, width, -1)


@lru_cache(maxsize=4)
def outside_neighborhood(
    height: int, width: int, radius: int, device: torch.device
) -> torch.Tensor:
    """Which pairs of patches of a grid are more than ``radius`` rows or columns apart.

    Returns:
        (h, w, h, w) of bool, kept for the next call.
    """
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    far_rows = (y[:, None] - y).abs() > radius  # hxh
    far_columns = (x[:, None] - x).abs() > radius  # wxw
    return far_rows[:, None, :, None] | far_columns[:, None, :]
