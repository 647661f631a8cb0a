"""The colours of a batch of views, on the device: what workers of ``DATA.BACKEND device`` leave.

They decode, crop, resize and flip. Jitter, grey, blur, solarising and normalising are done here for
the whole batch, from the draws that come along. Nothing here waits for the device.
"""

import math

import torch
import torch.nn.functional as F

from data.augmentation import MEAN, STD, ViewParameters

# of a view: factors of brightness, contrast and saturation for the three steps before the turn of
# the hue and for the three after it (1: no change), the turn, grey, where to solarise, and then the
# blur's weights
STEPS = 3
NUMBERS = 6 * STEPS + 3
FACTORS = ("brightness", "contrast", "saturation")
GREY = (0.299, 0.587, 0.114)  # Rec. 601


def pack(view: ViewParameters, most_sigma: float) -> torch.Tensor:
    """The draws of a view but its box and flip: float32 of a length that ``most_sigma`` decides.

    Args:
        view: what was drawn.
        most_sigma: the largest deviation that a blur can have, in pixels; 0 for no blur.
    """
    factors = [1.0] * (6 * STEPS)
    names = [name for name, _ in view.jitter]
    middle = names.index("hue") if "hue" in names else len(names)
    turn = 0.0
    for rank, (name, amount) in enumerate(view.jitter):
        if name == "hue":
            turn = amount
        else:
            step = rank if rank < middle else STEPS + rank - middle - 1
            factors[step * len(FACTORS) + FACTORS.index(name)] = amount
    start = view.solarize_from if view.solarize else 256
    return torch.tensor([*factors, turn, view.grey, start, *_blur_weights(view.sigma, most_sigma)])


def _blur_weights(sigma: float, most_sigma: float) -> list[float]:
    """Of the pixels from one side to the other, as many as the largest deviation needs."""
    most, reach = _reach(most_sigma), _reach(sigma)
    if not sigma:
        return [0.0] * most + [1.0] + [0.0] * most
    half = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(reach + 1)]
    total = 2 * sum(half) - 1
    half = [weight / total for weight in half] + [0.0] * (most - reach)
    return [*half[:0:-1], *half]


def _reach(sigma: float) -> int:
    return math.ceil(2.5 * sigma)


def finish(views: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Colour, blur and normalise a batch of views.

    Args:
        views: uint8 of (B, 3, S, S), cropped and flipped.
        draws: of ``pack``, (B, any number).

    Returns:
        float32 of the same shape, with ImageNet's mean and deviation.
    """
    x = views.float()
    steps = draws[:, : 6 * STEPS].view(-1, 2 * STEPS, len(FACTORS))
    turn, grey, start = (n.view(-1, 1, 1, 1) for n in draws[:, 6 * STEPS : NUMBERS].unbind(1))
    for step in range(STEPS):
        x = _scale(x, steps[:, step])
    x = _turn_hue(x, turn)
    for step in range(STEPS, 2 * STEPS):
        x = _scale(x, steps[:, step])
    x = torch.where(grey > 0, _luminance(x).expand_as(x), x)
    if draws.shape[1] > NUMBERS + 1:
        x = _blur(x, draws[:, NUMBERS:])
    x = torch.where(x < start, x, 255 - x)
    return (x - _colour([255 * m for m in MEAN], x)) / _colour([255 * s for s in STD], x)


def _colour(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """Three numbers as (3, 1, 1) on the device, filled there rather than copied."""
    return torch.stack([torch.full((1, 1), v, device=like.device) for v in values])


def _luminance(x: torch.Tensor) -> torch.Tensor:
    red, green, blue = x.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def _scale(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """One step of brightness, contrast or saturation: of the three factors two are 1."""
    bright, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors.unbind(1))
    grey = _luminance(x)
    mean = grey.mean((2, 3), keepdim=True).round()
    x = torch.lerp(grey, x, saturation)
    return torch.lerp(mean, x * bright, contrast).clamp(0, 255)


def _turn_hue(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the colour circle by a share of a whole turn."""
    most, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    range_ = most - least
    red, green, blue = (x[:, i : i + 1] for i in range(3))
    divisor = range_.clamp_min(1e-6)
    sixth = torch.where(
        most == red,
        (green - blue) / divisor,
        torch.where(most == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = sixth + 6 * turn
    # each channel falls from the largest to the smallest value and back over the circle
    places = torch.cat([sixth + 5, sixth + 3, sixth + 1], 1) % 6
    turned = most - range_ * torch.minimum(places, 4 - places).clamp(0, 1)
    return torch.where(turn == 0, x, turned)


def _blur(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Blur each view by its own weights, (B, K), along both sides."""
    batch, channels, height, width = x.shape
    weights = weights.repeat_interleave(channels, 0)[:, None, None]  # (B x 3, 1, 1, K)
    reach = weights.shape[-1] // 2
    x = x.reshape(1, batch * channels, height, width)
    while reach:  # torch reflects an image once; a wide blur needs its reflections reflected
        once = min(reach, x.shape[-1] - 1)
        x = F.pad(x, (once, once, once, once), mode="reflect")
        reach -= once
    x = F.conv2d(x, weights, groups=batch * channels)
    x = F.conv2d(x, weights.transpose(2, 3), groups=batch * channels)
    return x.reshape(batch, channels, height, width)
