"""The multi-layer perceptron of projector and predictor."""

import torch
from torch import nn

from models.batch_norm import SyncBatchNorm


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
