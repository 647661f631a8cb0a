"""Logistic regression against scikit-learn's, and its choice of the L2 strength."""

import pytest
import torch
import torch.nn.functional as F
from helpers import spawn
from sklearn.linear_model import LogisticRegression as Reference

from data.transfer import DIFFICULT
from evaluation import logistic_regression
from evaluation.logistic_regression import LogisticRegression, choose_strength

CLASSES = 5


def problem(images: int = 300, width: int = 12, separation: float = 1.0):
    """Features of unequal scales and a mean far from zero, with noisy classes."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(images, width, generator=generator)
    weight = torch.randn(width, CLASSES, generator=generator) * separation
    noise = torch.randn(images, CLASSES, generator=generator)
    labels = (plain @ weight + noise).argmax(1)
    return plain * torch.logspace(-1, 1, width) + 3, labels


def objective(features, labels, weight, bias, l2):
    losses = F.cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum")
    return (losses + l2 / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e3])
def test_it_agrees_with_scikit_learn(l2):
    features, labels = problem()
    fit = LogisticRegression(features, labels, CLASSES).fit(l2)
    reference = Reference(C=1 / l2, tol=1e-9, max_iter=20000).fit(features.double(), labels)
    weight, bias = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
    expected = objective(features, labels, weight, bias, l2)
    assert fit.converged
    assert fit.objective == pytest.approx(expected, rel=1e-4)
    assert fit.objective == pytest.approx(
        objective(features, labels, fit.weight, fit.bias, l2), rel=1e-9
    )
    own = F.cross_entropy(fit.scores(features), labels).item()
    theirs = F.cross_entropy(features.double() @ weight.T + bias, labels).item()
    assert own == pytest.approx(theirs, abs=1e-4)


def test_the_gradient_norm_is_that_of_the_objective():
    features, labels = problem()
    fit = LogisticRegression(features, labels, CLASSES).fit(0.1)
    weight, bias = (t.clone().requires_grad_() for t in (fit.weight, fit.bias))
    losses = F.cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum")
    (losses + 0.05 * weight.square().sum()).backward()
    expected = torch.cat([weight.grad, bias.grad[:, None]], 1).norm() / len(features)
    assert fit.gradient_norm == pytest.approx(expected.item(), rel=1e-6)
    assert fit.gradient_norm < 1e-4


def test_too_few_steps_are_not_called_converged():
    features, labels = problem()
    fit = LogisticRegression(features, labels, CLASSES).fit(1e-3, max_iterations=2)
    assert not fit.converged and fit.iterations <= 2


def test_a_warm_start_is_continued():
    regression = LogisticRegression(*problem(), CLASSES)
    fit = regression.fit(1.0)
    again = regression.fit(1.0, fit)
    assert again.iterations <= 1
    assert again.objective == pytest.approx(fit.objective, rel=1e-6)


def test_several_labels_an_image_are_one_regression_a_class():
    features, labels = problem()
    targets = F.one_hot(labels, CLASSES)
    targets[::7, 2] = DIFFICULT
    fit = LogisticRegression(features, targets, CLASSES).fit(1.0)
    kept = targets[:, 2] != DIFFICULT
    reference = Reference(C=1.0, tol=1e-9, max_iter=20000)
    reference.fit(features[kept].double(), targets[kept, 2])
    weight, bias = torch.from_numpy(reference.coef_[0]), reference.intercept_[0]
    torch.testing.assert_close(
        fit.scores(features)[:, 2], features.double() @ weight + bias, rtol=2e-2, atol=2e-2
    )


def test_separable_features_are_told_apart_and_random_labels_are_not():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(600) % CLASSES
    features = F.one_hot(labels, 16) + 0.1 * torch.randn(600, 16, generator=generator)
    mixed = labels[torch.randperm(600, generator=generator)]
    for truth, least, most in ((labels, 100, 100), (mixed, 0, 20 + 3 * (20 * 80 / 300) ** 0.5)):
        _, fit = choose_strength(
            features[:300], truth[:300], CLASSES, "top1", [1e-3, 1.0, 1e3], seed=0
        )
        hits = fit.scores(features[300:]).argmax(1) == truth[300:]
        assert least <= 100 * hits.double().mean().item() <= most


def test_the_strength_is_that_of_the_best_held_out_figure(monkeypatch, capsys):
    """Of equal ones the largest; the final fit has all images. A bar counts the fits."""
    monkeypatch.setattr(logistic_regression, "on_terminal", lambda: True)
    fitted = []
    original = LogisticRegression.fit

    def fit(self, l2, start=None, **options):
        fitted.append((self.num_images, l2, start is not None))
        return original(self, l2, start, **options)

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    values = {1e2: 50.0, 1.0: 70.0, 1e-1: 70.0, 1e-3: 60.0}
    order = iter(sorted(values, reverse=True))
    monkeypatch.setitem(logistic_regression.METRICS, "top1", lambda *_: values[next(order)])
    features, labels = problem(100)
    chosen, _ = choose_strength(features, labels, CLASSES, "top1", [1e-3, 1.0, 1e2, 1e-1], seed=0)
    assert chosen == 1.0
    assert [f[1] for f in fitted] == [1e2, 1.0, 1e-1, 1e-3, 1.0]
    assert [f[2] for f in fitted] == [False, True, True, True, False]
    assert [f[0] for f in fitted] == [80] * 4 + [100]
    shown = capsys.readouterr().err
    assert "L-BFGS:" in shown and "| 4/5 [" in shown and "l2=0.001" in shown


@pytest.mark.slow
def test_processes_fit_what_one_fits(tmp_path):
    features, labels = problem(101)
    alone = LogisticRegression(features, labels, CLASSES).fit(0.1)
    spawn(_fit, 2, str(tmp_path))
    for rank in range(2):
        weight = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        torch.testing.assert_close(weight, alone.weight, rtol=1e-3, atol=1e-4)


def _fit(rank: int, folder: str) -> None:
    fit = LogisticRegression(*problem(101), CLASSES).fit(0.1)
    torch.save(fit.weight, f"{folder}/{rank}.pth")


def test_the_objective_of_several_labels_by_hand():
    """The sum of the losses without those marked difficult, and the penalty."""
    torch.manual_seed(0)
    features = torch.randn(30, 4, dtype=torch.float64)
    targets = torch.randint(0, 2, (30, 3))
    targets[::5, 1] = DIFFICULT
    fit = LogisticRegression(features, targets, 3).fit(0.7)
    scores = fit.scores(features)
    losses = F.binary_cross_entropy_with_logits(
        scores, targets.clamp(min=0).double(), reduction="none"
    )
    expected = losses[targets != DIFFICULT].sum() + 0.35 * fit.weight.square().sum()
    assert fit.objective == pytest.approx(float(expected), rel=1e-9) and fit.converged
