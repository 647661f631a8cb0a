"""What BYOL, MoBY and SynCo share: an online branch and a momentum (key) branch."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.batch_norm import SyncBatchNorm, has_batch_norm
from models.encoder import Backbone
from utils.update import Forward, encode


class MLPHead(nn.Module):
    """Hidden layers of Linear, synchronised BatchNorm and ReLU, then a Linear.

    Source: MoBY (arXiv 2105.04553), section 3. Parameter names as published.

    Args:
        in_dim: width of the input.
        hidden_dim: width of the hidden layers.
        out_dim: width of the output.
        num_layers: number of Linear layers; 0 is the identity.

    Attributes:
        out_dim: width of the output, ``in_dim`` for no layers.

    Raises:
        ValueError: a negative number of layers.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256, num_layers: int = 2
    ) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got {num_layers}")
        # the leading identity gives the layers their published numbers
        hidden: list[nn.Module] = [nn.Identity()]
        width = in_dim
        for _ in range(num_layers - 1):
            hidden += [nn.Linear(width, hidden_dim), SyncBatchNorm(hidden_dim), nn.ReLU(True)]
            width = hidden_dim
        self.linear_hidden = nn.Sequential(*hidden)
        self.linear_out = nn.Linear(width, out_dim) if num_layers else nn.Identity()
        self.out_dim = out_dim if num_layers else in_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_dim) -> (B, out_dim)."""
        return self.linear_out(self.linear_hidden(x))


@dataclass
class Output(Forward):
    """What one forward pass gives: the mean loss over this process's images, a scalar, and more.

    Attributes:
        accuracy: share of the queries, 0 to 1, whose own key is the most similar of all keys.
        positive: mean cosine similarity of a query and its own key.
        keys: k1 and k2, (B, dim), without gradient.
        features: of both views by the online encoder, (B, F) each, without gradient.
    """

    accuracy: torch.Tensor
    positive: torch.Tensor
    keys: tuple[torch.Tensor, torch.Tensor]
    features: tuple[torch.Tensor, ...] = ()


class MomentumMethod(nn.Module):
    """Base of the methods: encoder, projector and predictor learn, the key branch follows.

    A method implements ``loss``. Nothing counts steps here: momentum and epoch are passed in.
    For each update, call ``update_key_encoder``, then ``forward`` for each micro-batch, and after
    the optimizer's step ``enqueue`` with the keys of each.

    Args:
        encoder: the online backbone, with ``num_features``.
        encoder_k: a second backbone of the same shape; takes over the weights of the first.
        proj_num_layers: Linear layers of the projector.
        pred_num_layers: Linear layers of the predictor.
    """

    def __init__(
        self,
        encoder: Backbone,
        encoder_k: Backbone,
        proj_num_layers: int = 2,
        pred_num_layers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder_k = encoder_k
        self.encoder_k.load_state_dict(encoder.state_dict())
        self.projector = MLPHead(encoder.num_features, num_layers=proj_num_layers)
        self.projector_k = copy.deepcopy(self.projector)
        self.predictor = MLPHead(
            self.projector.out_dim, out_dim=self.projector.out_dim, num_layers=pred_num_layers
        )
        self.encoder_k.requires_grad_(False)
        self.projector_k.requires_grad_(False)
        self.dim = self.projector.out_dim
        self.views_apart = has_batch_norm(encoder)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """Move the parameters of the key branch towards the online ones, before it encodes."""
        online: list[torch.Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        keys: list[torch.Tensor] = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(keys, online, 1 - momentum)

    def forward(self, view1: torch.Tensor, view2: torch.Tensor, epoch: int) -> Output:
        """Two views, (B, 3, H, W) each, at an epoch counted from 0."""
        # one pass for both views, except where BatchNorm inside the encoder would mix them
        images = [view1, view2] if self.views_apart else [torch.cat([view1, view2])]
        online1, online2 = self._encode(self.encoder, images)  # BxF
        q1, q2 = self._normalize(
            [self.predictor(self.projector(online)) for online in (online1, online2)]  # BxD
        )
        with torch.no_grad():
            k1, k2 = self._normalize(
                [self.projector_k(key) for key in self._encode(self.encoder_k, images)]
            )
        output = self.loss(q1, q2, k1, k2, epoch)
        output.features = online1.detach(), online2.detach()
        output.figures = {"accuracy": output.accuracy, "positive": output.positive}
        output.figures |= spread_figures((q1, q2), (k1, k2), self.queues())
        return output

    def loss(
        self, q1: torch.Tensor, q2: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, epoch: int
    ) -> Output:
        """The method's loss for unit float32 queries and keys, (B, dim) each."""
        raise NotImplementedError

    def enqueue(self, keys1: torch.Tensor, keys2: torch.Tensor, finite: torch.Tensor) -> None:
        """Keep the keys for later updates, if the method needs them; every process calls it.

        Args:
            keys1, keys2: of this process, (B, dim) each.
            finite: whether the update was made, a bool on the device; if not, nothing is kept.
        """

    def queues(self) -> tuple[torch.Tensor, ...]:
        """The keys that are kept, (dim, K) for each view; none if the method has no queue."""
        return ()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay skips."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    @staticmethod
    def _encode(encoder: nn.Module, images: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The features of both views, of one batch or two."""
        if len(images) == 2:
            return encode(encoder, images[0]), encode(encoder, images[1])
        return encode(encoder, images[0]).chunk(2)

    @staticmethod
    def _normalize(views: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        # in float32, even inside autocast
        return F.normalize(torch.cat(views).float(), dim=1).chunk(2)


@torch.no_grad()
def spread_figures(
    queries: tuple[torch.Tensor, ...],
    keys: tuple[torch.Tensor, ...],
    queues: tuple[torch.Tensor, ...],
) -> dict[str, torch.Tensor]:
    """How far the unit features of a batch lie apart.

    Args:
        queries: q1 and q2, (B, dim) each.
        keys: k1 and k2, (B, dim) each.
        queues: queue1 and queue2, (dim, K) each; none if the method has no queue.

    Returns:
        scalars on the device: ``negative``, the mean similarity of a query and the queue of its
        keys, or without a queue the keys of other images; and ``feature_std``, the standard
        deviation of the queries over the batch, averaged over the dimensions. With a single image
        there is only ``negative``, and only with a queue.
    """
    with torch.autocast(queries[0].device.type, enabled=False):
        figures = {}
        images = queries[0].shape[0]
        pairs = list(zip(queries, reversed(keys), strict=True))
        if queues:
            # a mean of products is the product of the means: no B x K matrix
            parts = [q.mean(0) @ n.mean(1) for q, n in zip(queries, reversed(queues), strict=True)]
            figures["negative"] = torch.stack(parts).mean()
        elif images > 1:
            parts = [(q.sum(0) @ k.sum(0) - (q * k).sum()) / (images**2 - images) for q, k in pairs]
            figures["negative"] = torch.stack(parts).mean()
        if images > 1:
            figures["feature_std"] = torch.stack([q.std(0).mean() for q in queries]).mean()
    return figures


def key_momentum(base: float, step: int, total_steps: int) -> float:
    """The momentum of update ``step`` of ``total_steps``: a cosine from ``base`` to 1.

    Source: BYOL (arXiv 2006.07733), section 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2
