"""SynCo-v2 as an installed package: ``load_encoder``, and what the ``synco-`` commands run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from synco_vit.own import keep_picklable, own_modules

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_encoder"]


def load_encoder(
    source: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    key: str = "encoder",
    img_size: int | None = None,
    container: str | None = None,
) -> nn.Module:
    """An encoder without a classifier, by its name or with the weights of a file.

    ```python
    encoder = load_encoder("OUT/synco/TAG")
    images = encoder.transform(Image.open("cat.jpg"))[None]  # (1, 3, 224, 224)
    with torch.inference_mode():
        features = encoder(images)  # (1, encoder.num_features)
    ```

    Args:
        source: a run folder; a file, or a folder of Hugging Face, with weights of any family that
            the evaluations read; or a name of an encoder, ``timm/<name>`` for those of timm. The
            weights of a name are random: nothing is downloaded.
        encoder: the name of the encoder, where the file does not tell it.
        key: ``encoder`` or ``encoder_k`` (momentum), of a pre-training checkpoint.
        img_size: side of the images in pixels, by default what the file says, else 224.
        container: where in a file of several encoders the weights lie, such as ``model.teacher``.

    Returns:
        the encoder in eval mode. Beside what timm gives it, such as ``num_features`` and
        ``forward_features`` (patches or maps before they are pooled), it has ``transform``: the
        evaluations' own, an 8-bit PIL image -> float32 of 3 x ``img_size`` x ``img_size``.

    Raises:
        ValueError: no such file or name, or not the weights of this encoder.
    """
    with own_modules():
        from evaluation.encoder import load_encoder as load
        from utils.errors import UserError

        try:
            return keep_picklable(load(os.fspath(source), encoder, key, img_size, container))
        except UserError as error:
            raise ValueError(str(error)) from error
