"""BYOL (arXiv 2006.07733): predict the key of the other view, without negatives."""

import torch

from models.momentum import MomentumMethod, Output


class BYOL(MomentumMethod):
    """The mean over both directions of the squared distance of unit query and key."""

    def loss(
        self, q1: torch.Tensor, q2: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, epoch: int
    ) -> Output:
        """BYOL, equation 2; the accuracy is that among the keys of the batch."""
        positive1 = (q1 * k2).sum(1)  # B
        positive2 = (q2 * k1).sum(1)
        loss = 0.5 * ((2 - 2 * positive1).mean() + (2 - 2 * positive2).mean())
        with torch.no_grad():
            own = torch.arange(q1.shape[0], device=q1.device)
            right = ((q1 @ k2.T).argmax(1) == own).float() + ((q2 @ k1.T).argmax(1) == own).float()
            positive = (positive1 + positive2).mean() / 2
        return Output(loss, right.mean() / 2, positive, (k1, k2))
