"""An encoder by its name or file alone, with the transform of the evaluations."""

import os

import torch
from torchvision import transforms
from torchvision.transforms import v2
from yacs.config import CfgNode

from data.augmentation import MEAN, STD
from data.dataset import resize_and_crop
from models import build_encoder
from models.encoder import ENCODERS, PREFIX, RESNETS, Backbone
from models.pretrained import open_encoder
from utils.checkpoint import LATEST
from utils.config import DEFAULTS, check_ranges, with_values
from utils.errors import UserError


def load_encoder(
    source: str,
    encoder: str | None = None,
    key: str = "encoder",
    img_size: int | None = None,
    container: str | None = None,
) -> Backbone:
    """``synco_vit.load_encoder``, which says what it takes and gives.

    Raises:
        UserError: no such file or name, or not the weights of this encoder.
    """
    if key not in ("encoder", "encoder_k"):
        raise UserError(f"key must be encoder or encoder_k, got {key!r}")
    if source in (*ENCODERS, *RESNETS) or (
        source.startswith(PREFIX) and not os.path.exists(source)
    ):
        sized = {"DATA.IMG_SIZE": img_size} if img_size else {}
        config = with_values(DEFAULTS, {"MODEL.ENCODER": source, **sized})
        check_ranges(config)
        loaded = build_encoder(config, 0.0)
    else:
        latest = os.path.join(source, LATEST)
        path = latest if os.path.exists(latest) else source
        if not os.path.exists(path):
            names = ", ".join([*ENCODERS, *RESNETS])
            raise UserError(f"{source}: no such file, and no encoder: {names} or {PREFIX}<name>")
        loaded, config = open_encoder(path, key, encoder, img_size, container)
    loaded.transform = build_transform(config)
    return loaded.eval()


def build_transform(config: CfgNode) -> transforms.Compose:
    """What ``data.loader`` does to a test image and its batch: PIL -> float32 of 3 x S x S.

    It is made of torchvision's parts alone, which any process can unpickle.
    """
    mean, std = ((255 * torch.tensor(values)).tolist() for values in (MEAN, STD))
    data = config.DATA
    return transforms.Compose(
        [
            v2.RGB(),
            *resize_and_crop(data.IMG_SIZE, data.INTERPOLATION, config.TEST.CROP),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(mean, std),
        ]
    )
