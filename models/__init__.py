"""Backbones and pre-training methods."""

import inspect

from yacs.config import CfgNode

from models.byol import BYOL
from models.encoder import Backbone, create_encoder
from models.moby import MoBY
from models.momentum import MomentumMethod
from models.synco import SynCo
from utils.errors import UserError, did_you_mean

METHODS: dict[str, type[MomentumMethod]] = {"byol": BYOL, "moby": MoBY, "synco": SynCo}
# arguments of the methods whose key has another name
KEYS = {
    "temperature": "CONTRAST_TEMPERATURE",
    "num_negatives": "CONTRAST_NUM_NEGATIVE",
    "counts": ("N1", "N2", "N3", "N4", "N5", "N6"),
}


def build_method(config: CfgNode) -> MomentumMethod:
    """The pre-training method that ``config.MODEL`` describes.

    Each argument of the method's constructor takes the value of the key with its name in capitals.
    Without such a key it keeps its default, or is set by ``MODEL.OPTIONS.<argument>``.

    Raises:
        UserError: an unknown method, option or encoder, or values that a method refuses.
    """
    model = config.MODEL
    if model.TYPE not in METHODS:
        hint = did_you_mean(model.TYPE, METHODS) or f", choose from {', '.join(METHODS)}"
        raise UserError(f"MODEL.TYPE {model.TYPE!r} is unknown{hint}")
    method = METHODS[model.TYPE]
    try:
        options = _options(method, model)
        return method(
            build_encoder(config, model.ONLINE_DROP_PATH_RATE),
            build_encoder(config, model.TARGET_DROP_PATH_RATE),
            **options,
        )
    except ValueError as error:
        raise UserError(f"MODEL.TYPE {model.TYPE}: {error}") from error


def _options(method: type[MomentumMethod], model: CfgNode) -> dict:
    options, own = {}, {}
    parameters = list(inspect.signature(method).parameters.values())
    for parameter in parameters[2:]:  # after the encoders
        key = KEYS.get(parameter.name, parameter.name.upper())
        if isinstance(key, tuple):
            options[parameter.name] = tuple(model[part] for part in key)
        elif key in model:
            options[parameter.name] = model[key]
        else:
            own[parameter.name] = type(parameter.default)
    for name, value in model.OPTIONS.items():
        if name not in own:
            known = ", ".join(own) or "none"
            raise UserError(f"MODEL.OPTIONS.{name}: the options of {model.TYPE} are: {known}")
        options[name] = own[name](value)
    return options


def build_encoder(config: CfgNode, drop_path_rate: float) -> Backbone:
    """The backbone that ``config`` describes, see ``create_encoder``."""
    model = config.MODEL
    return create_encoder(
        model.ENCODER,
        img_size=config.DATA.IMG_SIZE,
        drop_rate=model.DROP_RATE,
        drop_path_rate=drop_path_rate,
        stop_grad_conv1=model.STOP_GRAD_CONV1,
        replace_ln_with_bn=model.REPLACE_LN_WITH_BN,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        num_heads=model.NUM_HEADS,
        patch_size=model.PATCH_SIZE,
        window_size=model.WINDOW_SIZE,
    )
