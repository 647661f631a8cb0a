"""Logistic regression on features by L-BFGS, with the L2 strength chosen on held-out images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import minimize
from tqdm import tqdm
from yacs.config import CfgNode

from data.source import ImageSource
from data.transfer import DIFFICULT, TRANSFER_SETS
from evaluation.classification_metrics import METRICS
from evaluation.features import check_features, encode_images
from evaluation.judged import TRAIN, last_figures
from evaluation.linear import LinearClassifiers, score_classifier
from evaluation.protocols import hold_out
from models.encoder import Backbone
from utils.distributed import on_terminal, rank, world_size
from utils.errors import UserError
from utils.run import Run

GRADIENT_TOLERANCE = 1e-5  # of the mean loss's gradient, relative to that at zero weights


@dataclass(frozen=True)
class Fit:
    """A linear classifier and how well it was found.

    Attributes:
        weight: C x F, float64.
        bias: C, float64.
        objective: sum of the losses + l2 / 2 |weight|^2.
        gradient_norm: of the objective over the number of images, in (weight, bias).
        converged: the norm is below ``GRADIENT_TOLERANCE`` times that at zero.
        iterations: steps of L-BFGS.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    objective: float
    gradient_norm: float
    converged: bool
    iterations: int

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, F) -> scores (N, C) in float64."""
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return features.double() @ weight.T + bias


class LogisticRegression:
    """Fits multinomial logistic regression, or one binary regression for each class, by L-BFGS.

    The objective is that of Kornblith et al. 2019 (arXiv 1805.08974): the sum of the images'
    losses, plus l2 / 2 times the squared norm of the weights without the biases. scikit-learn's
    ``C`` is 1 / l2. It is minimised in float64. In the coordinates used, the features are centred
    and the Hessian at zero is about the identity. This does not move the minimum, and takes far
    fewer steps where the features' scales differ. Every process sums over its part of the images.

    Args:
        features: N x F.
        targets: class numbers (N,), or N x C of 1, 0 and ``DIFFICULT`` (left out).
        num_classes: number of classes.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor, num_classes: int) -> None:
        own = slice(rank(), None, world_size())
        self.num_images, self.num_classes = len(features), num_classes
        self.mean = features.double().mean(0)  # F
        self.features = features[own].double() - self.mean
        self.targets = targets[own]
        covariance = _sum_over_processes(self.features.T @ self.features)
        variances, self.axes = torch.linalg.eigh(covariance)  # F, FxF
        self.variances = variances.clamp(min=0)

    def fit(self, l2: float, start: Fit | None = None, max_iterations: int = 5000) -> Fit:
        """The minimum for the strength ``l2`` > 0, found from ``start`` or from zero."""
        # the loss's curvature for equally likely classes, a fair guess for others
        choices = self.num_classes if self.targets.ndim == 1 and self.num_classes > 1 else 2
        curvature = (1 - 1 / choices) / choices
        scale = (curvature * self.variances + l2).rsqrt()  # F
        bias_scale = (curvature * self.num_images) ** -0.5
        to_plain, to_scaled = self.axes * scale, self.axes / scale  # FxF, inverse but for a .T
        inputs = self.features @ to_plain  # nxF
        penalty = l2 * scale.square()
        shape = self.num_classes, len(scale) + 1
        latest = np.zeros(shape).flatten()  # the gradient asked for last

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            values = torch.from_numpy(flat).to(inputs).view(shape)
            weight, bias = values[:, :-1], values[:, -1] * bias_scale
            loss, slopes = self._loss(inputs @ weight.T + bias)  # slopes: nxC
            gradient = torch.cat([slopes.T @ inputs, slopes.sum(0)[:, None] * bias_scale], 1)
            sums = _sum_over_processes(torch.cat([loss[None], gradient.flatten()]))
            loss, gradient = sums[0], sums[1:].view(shape)
            gradient[:, :-1] += penalty * weight
            loss += (penalty * weight.square()).sum() / 2
            latest[:] = gradient.flatten().cpu().numpy()
            return loss.item(), latest.copy()

        def gradient_norm(gradient: np.ndarray) -> float:
            scaled = torch.from_numpy(gradient).to(inputs).view(shape)
            of_bias = scaled[:, -1:] / bias_scale
            of_weight = scaled[:, :-1] @ to_scaled.T + of_bias * self.mean
            return torch.cat([of_weight, of_bias], 1).norm().item() / self.num_images

        def stop_when_flat(_: np.ndarray) -> None:
            # L-BFGS calls this after the step to the point whose gradient it has just asked for
            if gradient_norm(latest) <= tolerance:
                raise StopIteration

        first = np.zeros(shape).flatten()
        tolerance = GRADIENT_TOLERANCE * gradient_norm(objective(first)[1])
        if start is not None:
            weight, bias = start.weight.to(inputs), start.bias.to(inputs)
            bias = (bias + weight @ self.mean) / bias_scale
            first = torch.cat([weight @ to_scaled, bias[:, None]], 1).flatten().cpu().numpy()
        found = minimize(
            objective,
            first,
            jac=True,
            method="L-BFGS-B",
            callback=stop_when_flat,
            options={
                "gtol": 0,
                "ftol": 0,
                "maxcor": 20,
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
            },
        )
        norm = gradient_norm(objective(found.x)[1])
        values = torch.from_numpy(found.x).to(inputs).view(shape)
        weight = values[:, :-1] @ to_plain.T
        bias = values[:, -1] * bias_scale - weight @ self.mean
        return Fit(weight, bias, float(found.fun), norm, norm <= tolerance, found.nit)

    def _loss(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses of scores (n, C), and its gradient (n, C)."""
        if self.targets.ndim == 1:
            log_probabilities = scores.log_softmax(1)
            loss = F.nll_loss(log_probabilities, self.targets, reduction="sum")
            gradient = log_probabilities.exp_()
            gradient[torch.arange(len(scores), device=scores.device), self.targets] -= 1
            return loss, gradient
        counted = self.targets != DIFFICULT
        truth = (self.targets == 1).to(scores)
        losses = F.binary_cross_entropy_with_logits(scores, truth, reduction="none")
        return (losses * counted).sum(), (scores.sigmoid() - truth) * counted


def choose_strength(
    features: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    metric: str,
    strengths: list[float],
    seed: int,
) -> tuple[float, Fit]:
    """Choose the L2 strength on a fifth of the images, then fit all of them.

    The strengths are tried from the largest to the smallest, each from the fit before. If several
    are equally good, the largest is taken (SimCLR, arXiv 2002.05709, appendix B.8; BYOL, arXiv
    2006.07733, appendix D).

    Args:
        features, targets, num_classes: as for ``LogisticRegression``.
        metric: a key of ``METRICS``; higher is better.
        strengths: what to choose from.
        seed: of the draw of the held-out images.

    Returns:
        the strength and the fit of all images with it.

    Raises:
        UserError: no image can be held out.
    """
    held_out = hold_out(targets, seed, 5).to(features.device)
    if not held_out.any():
        raise UserError("no class has a second image to choose the strength by: use --probe sgd")
    part = LogisticRegression(features[~held_out], targets[~held_out], num_classes)
    best, chosen, fit = -1.0, strengths[0], None
    fits = len(strengths) + 1
    with tqdm(total=fits, desc="L-BFGS", disable=not on_terminal(), leave=False) as bar:
        for l2 in sorted(strengths, reverse=True):
            bar.set_postfix(l2=l2)
            fit = part.fit(l2, fit)
            value = METRICS[metric](fit.scores(features[held_out]), targets[held_out])
            bar.update()
            if value > best:
                best, chosen = value, l2
        bar.set_postfix(l2=chosen)
        return chosen, LogisticRegression(features, targets, num_classes).fit(chosen)


def probe(
    config: CfgNode,
    encoder: Backbone,
    images: tuple[ImageSource, ImageSource],
    strengths: list[float],
    run: Run,
) -> tuple[dict[str, Any], LinearClassifiers]:
    """Judge an encoder by logistic regression on its features.

    Args:
        config: names the data set, and says how images are read.
        encoder: is used as it is.
        images: to train on, and to test on.
        strengths: of L2, see ``choose_strength``.
        run: device and log.

    Returns:
        the figures for results.json, and the encoder with the classifier.

    Raises:
        UserError: features or scores that are not finite.
    """
    metric, (train, test) = TRANSFER_SETS[config.DATA.DATASET].metric, images
    features, labels = encode_images(config, encoder, train, run)
    test_features, test_labels = encode_images(config, encoder, test, run)
    check_features(features, labels, "training")
    check_features(test_features, test_labels, "test")
    classes = len(train.classes)
    examples = features.to(run.device), labels.to(run.device)
    l2, fit = choose_strength(*examples, classes, metric, strengths, config.SEED)
    if not fit.converged:
        run.logger.warning("L-BFGS has not converged: take the figures with care")
    figure = score_classifier(fit.scores(test_features), test_labels, metric)
    if figure is None:
        raise UserError("L-BFGS has diverged, the scores are not finite: take --probe sgd")
    found = {"probe": "lbfgs", "l2": l2, "iterations": fit.iterations}
    found |= {"gradient_norm": fit.gradient_norm, "converged": fit.converged}
    run.logger.info("L-BFGS: %s", found)
    model = LinearClassifiers(encoder, classes, 1, config.SEED, frozen=True)
    model.heads[0].load_state_dict({"weight": fit.weight, "bias": fit.bias})
    chosen = {"epoch": None, "lr": None, "selected_on": TRAIN}
    last = last_figures(figure, None, None) | chosen
    return {"best": {"value": figure["value"], **chosen}, "last": last, **found}, model


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
