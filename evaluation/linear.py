"""Linear classifiers on an encoder: several on a frozen one, or one trained with it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from data.loader import normalize
from data.transfer import DIFFICULT
from evaluation.classification_metrics import MAP, METRICS, top_k_accuracy
from models.encoder import Backbone
from models.patch_features import ClassTokens, has_class_token, mean_of_patches
from utils.checkpoint import load_model, read_checkpoint
from utils.errors import UserError
from utils.update import Forward, encode


class LinearClassifiers(nn.Module):
    """An encoder with linear heads side by side, each learning as if it were alone.

    All heads begin with the same weights, so that they differ only in their rates.

    Args:
        encoder: images (B, 3, H, W) -> features (B, F), with its ``num_features``.
        num_classes: number of classes.
        num_heads: number of heads.
        seed: of the heads' weights.
        frozen: the encoder is used as it is; else it learns too.
        drops: a frozen encoder is in train mode while the heads learn, so that its stochastic
            depth and dropout act; its BatchNorms stay in eval mode. Else all of it stays so.
        tokens: what the heads see of the encoder, by default its feature.
        as_mae: as MAE's fine-tuning has it (arXiv 2111.06377, models_vit.py, main_finetune.py): of
            a ViT the heads see the mean of the patches after a LayerNorm of their own, in place
            of the class token after the encoder's last one; they begin near zero, and positions
            learn.
    """

    def __init__(
        self,
        encoder: Backbone,
        num_classes: int,
        num_heads: int,
        seed: int,
        frozen: bool,
        drops: bool = False,
        tokens: ClassTokens | None = None,
        as_mae: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.drops, self.tokens = encoder, drops, tokens
        width = tokens.width(encoder) if tokens else encoder.num_features
        heads = [nn.Linear(width, num_classes) for _ in range(num_heads)]
        for head in heads:
            generator = torch.Generator().manual_seed(seed)
            if as_mae:
                nn.init.trunc_normal_(head.weight, std=2e-5, generator=generator)
            else:
                nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.frozen = frozen
        encoder.requires_grad_(not frozen)
        self.fc_norm: nn.LayerNorm | None = None
        if as_mae and has_class_token(encoder):
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
            encoder.norm.requires_grad_(False)  # the heads do not see it
        if getattr(encoder, "fixed_positions", False):
            encoder.pos_embed.requires_grad_(as_mae)
            encoder.fixed_positions = not as_mae  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "LinearClassifiers":
        """As ``nn.Module.train``, but a frozen encoder stays in eval mode, see ``drops``."""
        super().train(mode)
        self.encoder.train(mode and (self.drops or not self.frozen))
        if self.frozen:
            for layer in self.encoder.modules():
                if isinstance(layer, _BatchNorm):  # its statistics are part of what is frozen
                    layer.eval()
        return self

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, F), what the heads see."""
        if self.fc_norm:
            return self.fc_norm(mean_of_patches(self.encoder, images))
        return self.tokens(self.encoder, images) if self.tokens else encode(self.encoder, images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> scores of each head (heads, B, classes) in float32."""
        # without a gradient the encoder keeps no activations
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.features(images)  # BxF
        with torch.autocast(images.device.type, enabled=False):
            return torch.stack([head(features.float()) for head in self.heads])

    def head_groups(self, rates: list[float], **options: Any) -> list[dict]:
        """A group for each head, with its rate as the ``lr_scale`` of timm's schedulers.

        Args:
            rates: of the heads.
            options: of torch's groups, such as ``weight_decay``.
        """
        return [
            {"params": list(head.parameters()), "lr_scale": rate, **options}
            for head, rate in zip(self.heads, rates, strict=True)
        ]

    def layer_groups(self, weight_decay: float, layer_decay: float) -> list[dict]:
        """Groups of encoder and heads; the rate falls by ``layer_decay`` with each layer down.

        Weight decay skips one-dimensional parameters and what the encoder names.

        Source: BEiT (arXiv 2106.08254), as MAE (arXiv 2111.06377) uses it.
        """
        groups = param_groups_layer_decay(
            self.encoder,
            weight_decay,
            no_weight_decay_list=self.encoder.no_weight_decay(),
            layer_decay=layer_decay,
        )
        weights, biases = ([getattr(h, n) for h in self.heads] for n in ("weight", "bias"))
        norm = list(self.fc_norm.parameters()) if self.fc_norm else []
        return groups + [
            {"params": weights, "lr_scale": 1.0, "weight_decay": weight_decay},
            {"params": biases + norm, "lr_scale": 1.0, "weight_decay": 0.0},
        ]

    def with_head(self, index: int) -> dict[str, torch.Tensor]:
        """The state of a model that has only head ``index``."""
        own = f"heads.{index}."
        return {
            name.replace(own, "heads.0."): value
            for name, value in self.state_dict().items()
            if name.startswith(own) or not name.startswith("heads.")
        }


def classification_loss(
    scores: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, multi_label: bool = False
) -> torch.Tensor:
    """The mean over images of the loss of one classifier.

    Args:
        scores: (B, C).
        targets: class numbers (B,), probabilities (B, C), or, for images with several labels,
            (B, C) of 1, 0 and ``DIFFICULT``.
        smoothing: label smoothing of class numbers.
        multi_label: use the sum over classes of the binary cross-entropies, without those marked
            difficult; else cross-entropy.
    """
    if not multi_label:
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)
    losses = F.binary_cross_entropy_with_logits(
        scores, targets.clamp(min=0).to(scores.dtype), reduction="none"
    )
    return (losses * (targets != DIFFICULT)).sum(1).mean()


def head_losses(
    scores: torch.Tensor, targets: torch.Tensor, smoothing: float, multi_label: bool
) -> torch.Tensor:
    """The loss of each head, (heads, B, C) -> (heads,), see ``classification_loss``."""
    return torch.stack([classification_loss(s, targets, smoothing, multi_label) for s in scores])


def score_classifier(
    scores: torch.Tensor, targets: torch.Tensor, metric: str
) -> dict[str, float | None] | None:
    """The figures of one classifier on all images.

    Args:
        scores: (N, C).
        targets: (N,) or, for the metric mAP, (N, C) as in ``classification_loss``.
        metric: a key of ``METRICS``.

    Returns:
        ``value`` of the metric, ``top1`` and ``top5`` in per cent, None where an image has
        several labels, and ``loss``; None for scores that are not finite.
    """
    if not scores.isfinite().all():
        return None
    several = metric == MAP
    return {
        "value": METRICS[metric](scores, targets),
        "top1": None if several else top_k_accuracy(scores, targets),
        "top5": None if several else top_k_accuracy(scores, targets, 5),
        "loss": classification_loss(scores, targets, multi_label=several).item(),
    }


def read_classifiers(
    path: str, encoder: Backbone, num_classes: int
) -> tuple[LinearClassifiers, dict[str, Any]]:
    """Read a checkpoint of classifiers for evaluation; ``encoder`` is of the same kind as theirs.

    Returns:
        the classifiers in eval mode, and the checkpoint with ``lr``, the rate of each head, and
        ``epoch``.

    Raises:
        UserError: another kind of checkpoint, another encoder or number of classes.
    """
    state = read_checkpoint(path)
    weights, tokens = state.get("model") or {}, state.get("class_tokens")
    if not {"lr", "epoch"} <= set(state) or "heads.0.bias" not in weights:
        raise UserError(f"{path}: not a checkpoint of linear classifiers")
    if tokens and not (isinstance(tokens, list) and [*map(type, tokens)] == [int, bool]):
        raise UserError(f"{path}: damaged, its class_tokens are {str(tokens)[:50]}")
    found = len(weights["heads.0.bias"])
    if found != num_classes:
        raise UserError(f"{path}: of {found} classes, the data set has {num_classes}")
    model = LinearClassifiers(
        encoder,
        num_classes,
        len(state["lr"]),
        0,
        frozen=True,
        tokens=ClassTokens(*tokens) if tokens else None,
        as_mae="fc_norm.weight" in weights,
    )
    load_model(model, weights, path)
    return model.eval(), state


@torch.no_grad()
def score_heads(
    model: LinearClassifiers,
    features: torch.Tensor,
    targets: torch.Tensor,
    metric: str,
    left_out: Sequence[bool] = (),
) -> list[dict[str, float | None] | None]:
    """The figures of each head on features (N, F), see ``score_classifier``.

    None for those that are left out.
    """
    device = next(model.heads.parameters()).device
    features, targets = features.to(device), targets.to(device)
    # one at a time, because N x C scores for every head can fill a GPU
    left_out = left_out or [False] * len(model.heads)
    return [
        None if left else score_classifier(head(features), targets, metric)
        for head, left in zip(model.heads, left_out, strict=True)
    ]


def forward_images(
    ddp: nn.Module,
    device: torch.device,
    smoothing: float,
    mixup: Mixup | None,
    batch: list[torch.Tensor],
) -> Forward:
    """The losses of the heads for a batch of images and targets."""
    images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    if images.is_cuda:  # where convolutions are faster so
        images = images.contiguous(memory_format=torch.channels_last)
    several = targets.ndim == 2
    if images.dtype == torch.uint8:
        images = normalize(images)
    if mixup:  # which smooths the labels that it makes
        images, targets = mixup(images, targets)
        smoothing = 0.0
    return Forward(head_losses(ddp(images), targets, smoothing, several))


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix of the section AUG, None if both are off."""
    aug = config.AUG
    if not (aug.MIXUP or aug.CUTMIX or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise UserError("mixup pairs images: make --batch-size even or set AUG.MIXUP and CUTMIX 0")
    return Mixup(
        aug.MIXUP,
        aug.CUTMIX,
        aug.CUTMIX_MINMAX,
        aug.MIXUP_PROB,
        aug.MIXUP_SWITCH_PROB,
        aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )
