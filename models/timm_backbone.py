"""Any backbone of timm, without a classifier."""

import difflib
import re
from collections.abc import Callable
from typing import Any, cast

import timm
from torch import nn

from utils.errors import UserError

PREFIX = "timm/"
# for images of other sizes than those of training, where a backbone can
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}


class Backbone(nn.Module):
    """What a type checker must know of the encoders, whose real classes are timm's and many."""

    num_features: int
    feature_info: list[dict[str, Any]]
    no_weight_decay: Callable[[], set[str]]
    forward_intermediates: Callable[..., Any]
    set_grad_checkpointing: Callable[[bool], None]


def create_timm_backbone(name: str, **options: Any) -> tuple[Backbone, dict[str, Any]]:
    """A backbone of timm with random weights; nothing is downloaded.

    Args:
        name: a name of ``timm.list_models()``, also with ``timm/`` before it.
        options: of its constructor, such as ``img_size`` and ``drop_path_rate``.

    Returns:
        the backbone, images (B, 3, H, W) -> features (B, ``num_features``), and those of
        ``options`` that this backbone has; the others are left out.

    Raises:
        UserError: timm does not know the name, or refuses the size.
    """
    name = name.removeprefix(PREFIX)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"MODEL.ENCODER {PREFIX}{name}: timm has no such model, {hint}")
    options = ANY_SIZE | options
    while True:
        try:
            encoder = cast(
                Backbone, timm.create_model(name, pretrained=False, num_classes=0, **options)
            )
            break
        except TypeError as error:
            # the constructors tell what they do not know one by one
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not unknown or unknown[1] not in options:
                raise
            del options[unknown[1]]
        except (AssertionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"MODEL.ENCODER {PREFIX}{name}: timm refuses it ({reason})") from error
    # some have layers between the last map and the classifier
    encoder.num_features = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    if not hasattr(encoder, "no_weight_decay"):
        encoder.no_weight_decay = set  # none beside the one-dimensional ones
    return encoder, options
