"""The backbones for ``torch.hub.load``, of a clone or of a repository."""

import collections.abc
import os
import sys

dependencies = ["torch", "timm", "yacs", "yaml", "safetensors"]

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGES = ("models", "utils", "data", "logger")


def _import_own():
    """Import from here, though the caller may have modules of the same names, and leave those."""

    def own_names() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in _PACKAGES]

    file = getattr(sys.modules.get("models"), "__file__", None) or ""
    inside = os.path.abspath(file) == os.path.join(_HERE, "models", "__init__.py")
    aside = {} if inside else {name: sys.modules.pop(name) for name in own_names()}
    sys.path.insert(0, _HERE)
    try:
        from models.encoder import ENCODERS, create_encoder
        from models.pretrained import load_encoder_weights
    finally:
        sys.path.remove(_HERE)
        if not inside:
            for name in own_names():
                del sys.modules[name]
            sys.modules.update(aside)
    return ENCODERS, create_encoder, load_encoder_weights


_ENCODERS, _create, _load = _import_own()


def _entry(encoder: str) -> collections.abc.Callable:
    def create(checkpoint=None, key="encoder", **options):
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
