"""Backbones and pre-training methods."""

from yacs.config import CfgNode

from models.byol import BYOL
from models.encoder import create_encoder
from models.moby import MoBY
from models.momentum import MomentumMethod
from models.synco import SynCo
from utils.errors import UserError

METHODS: dict[str, type[MomentumMethod]] = {"byol": BYOL, "moby": MoBY, "synco": SynCo}


def build_method(config: CfgNode) -> MomentumMethod:
    """The pre-training method that ``config.MODEL`` describes.

    Raises:
        UserError: an unknown method or encoder, or values that a method refuses.
    """
    model = config.MODEL
    if model.TYPE not in METHODS:
        raise UserError(f"MODEL.TYPE {model.TYPE!r} is unknown, choose from {', '.join(METHODS)}")
    options = {"proj_num_layers": model.PROJ_NUM_LAYERS, "pred_num_layers": model.PRED_NUM_LAYERS}
    if model.TYPE != "byol":
        options |= {
            "temperature": model.CONTRAST_TEMPERATURE,
            "num_negatives": model.CONTRAST_NUM_NEGATIVE,
        }
    if model.TYPE == "synco":
        options |= {
            "n_hard": model.N_HARD,
            "counts": (model.N1, model.N2, model.N3, model.N4, model.N5, model.N6),
            "warmup_epochs": model.WARMUP_EPOCHS,
            "cooldown_epochs": model.COOLDOWN_EPOCHS,
            "alpha": model.ALPHA,
            "beta": model.BETA,
            "gamma": model.GAMMA,
            "sigma": model.SIGMA,
            "delta": model.DELTA,
            "eta": model.ETA,
        }
    try:
        return METHODS[model.TYPE](
            build_encoder(config, model.ONLINE_DROP_PATH_RATE),
            build_encoder(config, model.TARGET_DROP_PATH_RATE),
            **options,
        )
    except ValueError as error:
        raise UserError(f"MODEL.TYPE {model.TYPE}: {error}") from error


def build_encoder(config: CfgNode, drop_path_rate: float):
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
    )
