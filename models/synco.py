"""SynCo (arXiv 2410.02401, 2509.02024): MoBY with six kinds of synthetic hard negatives.

A synthetic negative v starts from one of the query's most similar keys n, is L2-normalised, and
carries no gradient, so the loss reaches q through the product q.v alone:

    1. interpolated  a q + (1 - a) n          a ~ U(ALPHA)
    2. extrapolated  q + b (n - q)            b ~ U(BETA)
    3. mixed         g n + (1 - g) n'         g ~ U(GAMMA)
    4. noise         n + z                    z ~ N(0, sigma^2 I)
    5. perturbed     n + delta grad_n(q.n)            = n + delta q
    6. adversarial   n + eta sign(grad_n(q.n))        = n + eta sign(q)

Nothing here builds v. With q' for q held constant and unit q and n, types 1, 2 and 5 are
v = (A q' + B n) / |A q' + B n|, so q.v = (A q.q' + B q.n) / sqrt(A^2 + B^2 + 2 A B q'.n), and q.n
is at hand: it is an entry of q times queue. In place of q', type 6 has sign(q'), type 3 a second
key, and type 4 the noise. Only the noise needs a vector for each negative.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.encoder import Backbone
from models.moby import MoBY, contrastive_loss


@dataclass
class Draws:
    """The random numbers of one call: which keys, and the coefficients.

    Attributes:
        columns: for types 1 to 6 the queue columns of n, B x N_i each, then those of the second
            key of type 3.
        uniform: draws of U(0, 1) for types 1, 2 and 3, B x N_i each.
        normal: draws of N(0, 1) for type 4, B x N4 x dim.
    """

    columns: list[torch.Tensor]
    uniform: list[torch.Tensor]
    normal: torch.Tensor


class SyntheticNegatives:
    """The six kinds; SynCo and SynCoLoss have them.

    Attributes:
        n_hard: how many of a query's most similar keys its negatives are made from.
        counts: negatives of the types 1 to 6 for each query.
        alpha, beta, gamma: ranges of the coefficients of types 1, 2 and 3.
        sigma: standard deviation of the noise of type 4.
        delta: step of type 5.
        eta: step of type 6.
    """

    def set_synthetic(
        self,
        n_hard: int,
        counts: tuple[int, ...],
        alpha: tuple[float, float] = (0.0, 0.5),
        beta: tuple[float, float] = (1.0, 1.5),
        gamma: tuple[float, float] = (0.0, 1.0),
        sigma: float = 0.1,
        delta: float = 0.01,
        eta: float = 0.01,
    ) -> None:
        """Set the attributes.

        Raises:
            ValueError: not six counts, a negative one, or no hard keys.
        """
        if len(counts) != 6 or min(counts) < 0:
            raise ValueError(f"counts must be six numbers that are not negative, got {counts}")
        if n_hard < 1:
            raise ValueError(f"n_hard must be at least 1, got {n_hard}")
        self.n_hard, self.counts = n_hard, tuple(counts)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.sigma, self.delta, self.eta = sigma, delta, eta

    @torch.no_grad()
    def draw(self, similarity: torch.Tensor, dim: int) -> Draws:
        """Draw for B queries, given their similarities to the queue (B x K)."""
        batch, device = similarity.shape[0], similarity.device
        n1, n2, n3, n4, n5, n6 = self.counts
        hard = similarity.topk(self.n_hard, dim=1, sorted=False).indices  # Bxn_hard
        picks = torch.randint(self.n_hard, (batch, sum(self.counts) + n3), device=device)
        columns = hard.gather(1, picks).split([n1, n2, n3, n4, n5, n6, n3], dim=1)
        uniform = torch.rand(batch, n1 + n2 + n3, device=device).split([n1, n2, n3], dim=1)
        return Draws(list(columns), list(uniform), torch.randn(batch, n4, dim, device=device))

    def synthetic(
        self, q: torch.Tensor, similarity: torch.Tensor, queue: torch.Tensor, draws: Draws
    ) -> list[torch.Tensor]:
        """The similarities q.v to the six kinds of negatives, (B, N_i) each."""
        const = q.detach()  # BxD, the q inside a negative
        qq = (q * const).sum(1, keepdim=True)  # Bx1, its gradient is q'
        sign = const.sign()
        a, b, g = (
            low + (high - low) * u
            for (low, high), u in zip(
                (self.alpha, self.beta, self.gamma), draws.uniform, strict=True
            )
        )
        _, _, c3, c4, _, c6, c3_other = draws.columns
        # one gather for all types: its backward pass writes B x K once
        picked = similarity.gather(1, torch.cat(draws.columns, dim=1))
        qn1, qn2, qn3, qn4, qn5, qn6, qn3_other = picked.split(
            [c.shape[1] for c in draws.columns], dim=1
        )

        def along_q(
            qn: torch.Tensor, of_q: torch.Tensor | float, of_n: torch.Tensor | float
        ) -> torch.Tensor:
            norm = _length(of_q**2 + of_n**2 + 2 * of_q * of_n * qn.detach())
            return (of_q * qq + of_n * qn) / norm

        keys = queue.T  # KxD
        z = draws.normal  # BxN4xD
        qz = torch.einsum("bd,bnd->bn", q, z)
        n4z = _products(z, keys, c4)
        zz = torch.linalg.vector_norm(z, dim=2) ** 2
        n3n3 = _products(F.embedding(c3_other, keys), keys, c3)
        sign_n = (sign @ queue).gather(1, c6)
        return [
            along_q(qn1, a, 1 - a),
            along_q(qn2, 1 - b, b),
            (g * qn3 + (1 - g) * qn3_other) / _length(g**2 + (1 - g) ** 2 + 2 * g * (1 - g) * n3n3),
            (qn4 + self.sigma * qz) / _length(1 + 2 * self.sigma * n4z + self.sigma**2 * zz),
            along_q(qn5, self.delta, 1.0),
            (qn6 + self.eta * (q * sign).sum(1, keepdim=True))
            / _length(1 + 2 * self.eta * sign_n + self.eta**2 * sign.square().sum(1, keepdim=True)),
        ]


class SynCo(SyntheticNegatives, MoBY):
    """MoBY whose queries get N1 + ... + N6 more negatives in a window of epochs.

    Args:
        encoder, encoder_k, proj_num_layers, pred_num_layers, temperature, num_negatives: as in
            MoBY.
        n_hard, counts, alpha, beta, gamma, sigma, delta, eta: as in SyntheticNegatives.
        warmup_epochs: first epoch, from 0, with synthetic negatives.
        cooldown_epochs: last epoch with them.

    Raises:
        ValueError: see SyntheticNegatives; or more hard keys than the queue holds.
    """

    def __init__(
        self,
        encoder: Backbone,
        encoder_k: Backbone,
        proj_num_layers: int = 2,
        pred_num_layers: int = 2,
        temperature: float = 0.2,
        num_negatives: int = 4096,
        n_hard: int = 256,
        counts: tuple[int, ...] = (128, 128, 128, 128, 128, 128),
        warmup_epochs: int = 30,
        cooldown_epochs: int = 100,
        alpha: tuple[float, float] = (0.0, 0.5),
        beta: tuple[float, float] = (1.0, 1.5),
        gamma: tuple[float, float] = (0.0, 1.0),
        sigma: float = 0.1,
        delta: float = 0.01,
        eta: float = 0.01,
    ) -> None:
        if not 1 <= n_hard <= num_negatives:
            raise ValueError(f"n_hard must be from 1 to the queue's {num_negatives}, got {n_hard}")
        super().__init__(
            encoder, encoder_k, proj_num_layers, pred_num_layers, temperature, num_negatives
        )
        self.set_synthetic(n_hard, counts, alpha, beta, gamma, sigma, delta, eta)
        self.warmup_epochs = warmup_epochs
        self.cooldown_epochs = cooldown_epochs

    def negatives(
        self, q: torch.Tensor, similarity: torch.Tensor, queue: torch.Tensor, epoch: int
    ) -> list[torch.Tensor]:
        """The queue and, within the window of epochs, the synthetic negatives."""
        if epoch not in self.epochs_with_synthetic(epoch + 1):
            return [similarity]
        draws = self.draw(similarity.detach(), queue.shape[0])
        return [similarity, *self.synthetic(q, similarity, queue, draws)]

    def epochs_with_synthetic(self, epochs: int) -> range:
        """Which of the epochs 0 to ``epochs`` - 1 have synthetic negatives."""
        if not sum(self.counts):
            return range(0)
        return range(max(0, self.warmup_epochs), min(epochs, self.cooldown_epochs + 1))


class SynCoLoss(SyntheticNegatives, nn.Module):
    """The contrastive loss with synthetic hard negatives, for any method with queries and a queue.

    >>> q, k = (F.normalize(torch.randn(8, 64), dim=1) for _ in range(2))
    >>> queue = F.normalize(torch.randn(64, 512), dim=0)
    >>> loss = SynCoLoss(temperature=0.2, n_hard=64, counts=(16, 16, 16, 16, 16, 16))
    >>> loss(q.requires_grad_(), k, queue).backward()

    Args:
        temperature: divides the similarities.
        n_hard, counts, options: as in SyntheticNegatives.

    Raises:
        ValueError: see SyntheticNegatives.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        n_hard: int = 256,
        counts: tuple[int, ...] = (128, 128, 128, 128, 128, 128),
        **options: Any,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.set_synthetic(n_hard, counts, **options)

    def forward(self, q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, in float32.

        Args:
            q: unit queries, (B, dim).
            k: their unit keys, (B, dim), without gradient.
            queue: unit keys of others, (dim, K), without gradient, K at least ``n_hard``.
        """
        with torch.autocast(q.device.type, enabled=False):
            q, k, queue = q.float(), k.float(), queue.float()
            positive = (q * k).sum(1, keepdim=True)
            similarity = q @ queue
            draws = self.draw(similarity.detach(), queue.shape[0])
            synthetic = self.synthetic(q, similarity, queue, draws)
            return contrastive_loss(positive, [similarity, *synthetic], self.temperature)


def synco_loss(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, **options: Any
) -> torch.Tensor:
    """``SynCoLoss(**options)(q, k, queue)``."""
    return SynCoLoss(**options)(q, k, queue)


def _length(squared: torch.Tensor) -> torch.Tensor:
    """The square root, for a sum whose parts cancel that of its rounding error: never 0 or NaN."""
    return squared.clamp_min(torch.finfo(squared.dtype).eps).sqrt()


def _products(vectors: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The dot product of each vector with the key that ``columns`` names.

    vectors of B x N x D, keys of K x D, columns of B x N -> B x N.
    """
    return (vectors * F.embedding(columns, keys)).sum(2)
