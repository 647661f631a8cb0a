"""The backbones for ``torch.hub.load``, of a clone or of a repository."""

import collections.abc

from synco_vit import load_encoder  # noqa: F401 an entry, too
from synco_vit.own import own_modules as _own_modules

dependencies = ["torch", "timm", "yacs", "yaml", "safetensors"]

with _own_modules():
    from models.encoder import ENCODERS as _ENCODERS
    from models.encoder import create_encoder as _create
    from models.pretrained import load_encoder_weights as _load


def _entry(encoder: str) -> collections.abc.Callable:
    def create(checkpoint=None, key="encoder", **options):
        with _own_modules():
            model = _create(encoder, **options)
            if checkpoint is not None:
                _load(model, str(checkpoint), key)
        return model.eval()

    create.__name__ = create.__qualname__ = encoder
    create.__doc__ = f"""{encoder} without a classifier: images (B, 3, H, W) -> features (B, F).

    Args:
        checkpoint: path of weights of any family that the evaluations read; None leaves them
            random. Nothing is downloaded.
        key: ``encoder`` or ``encoder_k`` (momentum), of a pre-training checkpoint.
        options: of ``models.encoder.create_encoder``, such as ``img_size``, or ``num_heads=6``
            for the ViT-S of DINO and DeiT.

    Returns:
        the backbone in eval mode, with its width in ``num_features``.
    """
    return create


globals().update({_name: _entry(_name) for _name in _ENCODERS})
