"""MoBY (arXiv 2105.04553): BYOL's branches, MoCo's queue and loss."""

import torch
import torch.nn.functional as F

from models.encoder import Backbone
from models.momentum import MomentumMethod, Output
from utils.distributed import all_gather_batch


def contrastive_loss(
    positive: torch.Tensor, negatives: list[torch.Tensor], temperature: float
) -> torch.Tensor:
    """InfoNCE: the cross entropy of the positive among all, a scalar.

    Args:
        positive: similarities of the queries and their keys, (B, 1).
        negatives: similarities to others, (B, any number) each.
        temperature: divides the similarities.
    """
    logits = torch.cat([positive, *negatives], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target)


class MoBY(MomentumMethod):
    """Each query must find its key among the keys of earlier batches.

    Two first-in-first-out queues, one for each view. The buffers are named as published:
    ``queue1`` and ``queue2`` of dim x length, and ``queue_ptr`` of 1, the next column to write.
    The queues start as unit-norm noise of torch's default generator: seed all processes alike.

    Args:
        encoder, encoder_k, proj_num_layers, pred_num_layers: as in MomentumMethod.
        temperature: divides the similarities.
        num_negatives: length of a queue.

    Raises:
        ValueError: a temperature or a length that is not positive.
    """

    queue1: torch.Tensor
    queue2: torch.Tensor
    queue_ptr: torch.Tensor

    def __init__(
        self,
        encoder: Backbone,
        encoder_k: Backbone,
        proj_num_layers: int = 2,
        pred_num_layers: int = 2,
        temperature: float = 0.2,
        num_negatives: int = 4096,
    ) -> None:
        if temperature <= 0 or num_negatives < 1:
            raise ValueError(
                f"temperature and num_negatives must be positive, got {temperature} "
                f"and {num_negatives}"
            )
        super().__init__(encoder, encoder_k, proj_num_layers, pred_num_layers)
        self.temperature = temperature
        for name in ("queue1", "queue2"):
            keys = F.normalize(torch.randn(self.dim, num_negatives), dim=0)
            # of the published shape, but a key's values lie side by side: rows are read and written
            self.register_buffer(name, keys.T.contiguous().T)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def loss(
        self, q1: torch.Tensor, q2: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, epoch: int
    ) -> Output:
        """MoBY, section 3: CE(q1 against k2 and queue2) + CE(q2 against k1 and queue1)."""
        loss1, accuracy1, positive1 = self._contrast(q1, k2, self.queue2, epoch)
        loss2, accuracy2, positive2 = self._contrast(q2, k1, self.queue1, epoch)
        return Output(
            loss1 + loss2, (accuracy1 + accuracy2) / 2, (positive1 + positive2) / 2, (k1, k2)
        )

    def _contrast(
        self, q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            positive = (q * k).sum(1, keepdim=True)  # Bx1
            similarity = q @ queue  # BxK
            negatives = self.negatives(q, similarity, queue, epoch)
            loss = contrastive_loss(positive, negatives, self.temperature)
        with torch.no_grad():
            accuracy = (positive > similarity.amax(1, keepdim=True)).float().mean()
        return loss, accuracy, positive.detach().mean()

    def negatives(
        self, q: torch.Tensor, similarity: torch.Tensor, queue: torch.Tensor, epoch: int
    ) -> list[torch.Tensor]:
        """The similarities of the queries and their negatives: a list of (B, any number).

        Args:
            q: unit queries, B x dim.
            similarity: q times queue, B x K.
            queue: unit keys, dim x K.
            epoch: the epoch, from 0.
        """
        return [similarity]

    def queues(self) -> tuple[torch.Tensor, ...]:
        """queue1 and queue2, (dim, K) each."""
        return self.queue1, self.queue2

    @torch.no_grad()
    def enqueue(self, keys1: torch.Tensor, keys2: torch.Tensor, finite: torch.Tensor) -> None:
        """Replace the oldest keys by the keys of all processes; wraps around.

        Args:
            keys1, keys2: of this process, (B, dim) each.
            finite: whether the update was made, a bool on the device; if not, nothing is kept.

        Raises:
            ValueError: more keys than the queue holds.
        """
        length = self.queue1.shape[1]
        gathered = all_gather_batch(torch.stack([keys1, keys2], 1))  # Nx2xD, both in one gather
        count = len(gathered)
        if count > length:
            raise ValueError(f"{count} keys do not fit into a queue of {length}")
        # computed on the device, so that no step waits for the pointer's or the flag's value
        columns = (self.queue_ptr + torch.arange(count, device=keys1.device)) % length
        for queue, keys in zip(self.queues(), gathered.unbind(1), strict=True):
            queue.index_copy_(1, columns, torch.where(finite, keys.T, queue[:, columns]))
        self.queue_ptr.add_(count * finite).remainder_(length)
