"""What the classifiers of an evaluation have achieved, and which of their figures is reported."""

import logging
from collections.abc import Sequence
from typing import Any

from evaluation.linear import LinearClassifiers
from utils.checkpoint import save_checkpoint
from utils.distributed import rank
from utils.errors import Diverged

Figures = Sequence[dict[str, float | None] | None]  # of each head, None for one that has diverged
TEST, TRAIN = "test", "train"  # the images that epoch and rate are chosen on
CHOSEN_ON = {TEST: "the test images", TRAIN: "held-out training images"}


class Judged:
    """What the heads have achieved.

    Args:
        rates: of the heads.
        also: what else a checkpoint says of how they learn.

    Attributes:
        epoch: the last one that was judged.
        best: ``value``, ``epoch`` and ``lr`` of the best head so far, the value on the test
            images; ``held_out`` is its value on held-out images, if these choose.
        figures: of each head on the test images after the last epoch.
        left_out: whether each head has diverged for good.
    """

    def __init__(self, rates: list[float], also: dict[str, Any] | None = None) -> None:
        self.rates, self.also = rates, also or {}
        self.epoch = -1
        self.best: dict[str, Any] | None = None
        self.figures: Figures = []
        self.left_out = [False] * len(rates)

    def leave_out(self, diverged: list[bool]) -> None:
        """Stop judging these heads."""
        self.left_out = [a or b for a, b in zip(self.left_out, diverged, strict=True)]

    def add(self, epoch: int, figures: Figures, held_out: Figures | None = None) -> None:
        """Take the figures of all heads after an epoch, and keep the best so far.

        Args:
            epoch: from 0.
            figures: on the test images.
            held_out: on held-out training images, which choose in place of the test images.

        Raises:
            Diverged: all heads have.
        """
        self.epoch, self.figures = epoch, figures
        choosing = "value" if held_out is None else "held_out"
        for rate, figure, chosen_by in zip(self.rates, figures, held_out or figures, strict=True):
            if not figure or not chosen_by:
                continue
            value = chosen_by["value"]
            if self.best is None or value > self.best[choosing]:
                self.best = {"value": figure["value"], "epoch": epoch, "lr": rate, choosing: value}
        if self.best is None:
            raise Diverged(f"training diverged with all rates {self.rates}: lower --lr")

    def log(self, metric: str, logger: logging.Logger) -> None:
        """Log a line for each head."""
        for rate, figure in zip(self.rates, self.figures, strict=True):
            logger.info("epoch %d, lr %g: %s %s", self.epoch, rate, metric, describe(figure))

    def outcome(self, selected_on: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """``best`` and ``last`` of results.json.

        Args:
            selected_on: ``TEST`` or ``TRAIN``, the images that have chosen.

        Returns:
            the best head, and the figures of that head after the last epoch, None if it has
            diverged. Its rate was chosen too if there were several, its epoch was not.
        """
        if self.best is None:
            raise ValueError("no epoch was judged")
        rate = self.best["lr"]
        last = last_figures(self.figures[self.rates.index(rate)], self.epoch, rate)
        last["selected_on"] = selected_on if len(self.rates) > 1 else None
        return self.best | {"selected_on": selected_on}, last

    def save_best(self, model: LinearClassifiers, path: str, **more: Any) -> None:
        """Write the best head alone to ``path``, if the last epoch made it the best."""
        if rank() == 0 and self.best and self.best["epoch"] == self.epoch:
            rate = self.best["lr"]
            state: dict[str, Any] = {"model": model.with_head(self.rates.index(rate)), "lr": [rate]}
            state |= {"epoch": self.epoch, "best": self.best, "figures": self.figures}
            save_checkpoint(state | more, path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        state = {"judged": self.epoch, "best": self.best, "figures": self.figures}
        return self.also | state | {"left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from a checkpoint; v0.1 wrote its checkpoints after their epoch was judged."""
        self.epoch = state.get("judged", state["epoch"])
        self.best, self.figures = state["best"], state["figures"]
        self.left_out = state.get("left_out", self.left_out)


def last_figures(
    figure: dict[str, float | None] | None, epoch: int | None, rate: float | None
) -> dict[str, Any]:
    """``last`` of results.json, from the figures of a head on the test images."""
    figure = figure or {}  # a head that has diverged in the end has none
    figures = {name: figure.get(name) for name in ("value", "top1", "top5", "loss")}
    return figures | {"epoch": epoch, "lr": rate}


def table(metric: str, best: dict[str, Any], last: dict[str, Any]) -> list[list[str]]:
    """Rows of figures, the head first, from ``best`` and ``last`` of results.json."""
    kinds = {"value": ".4f", "top5": ".4f", "loss": ".4f", "epoch": "d", "lr": "g"}
    head = ["", f"{metric} %", "top5 %", "loss", "epoch", "rate"]

    def row(figures: dict[str, Any]) -> list[str]:
        values = ((figures.get(kind), form) for kind, form in kinds.items())
        return ["-" if value is None else format(value, form) for value, form in values]

    return [head, ["last", *row(last)], ["best", *row(best)]]


def summary(metric: str, best: dict[str, Any], last: dict[str, Any]) -> str:
    """The line that says which figure is which, from ``best`` and ``last`` of results.json."""

    def say(figure: dict[str, Any]) -> str:
        value = "none" if figure["value"] is None else f"{figure['value']:.4f}"
        epoch = "" if figure["epoch"] is None else f" after epoch {figure['epoch']}"
        rate = "" if figure["lr"] is None else f", rate {figure['lr']:g}"
        return f"{metric} {value} on the test images{epoch}{rate}"

    of_rate = ""
    if last["selected_on"]:
        what = "strength" if last["epoch"] is None else "rate"
        of_rate = f" ({what} chosen on {CHOSEN_ON[last['selected_on']]})"
    what = "strength" if best["epoch"] is None else "epoch and rate"
    return (
        f"last: {say(last)}{of_rate}; best: {say(best)} ({what} chosen on "
        f"{CHOSEN_ON[best['selected_on']]})"
    )


def by_name(
    names: Sequence[str], figures: Figures, held_out: Figures | None = None
) -> dict[str, float | None]:
    """The figures of all heads by name, ``value@0.1`` for the head of rate 0.1.

    Args:
        names: of the heads.
        figures: on the test images.
        held_out: on held-out images, of which the value alone is told.
    """
    named = {}
    for i, name in enumerate(names):
        end = f"@{name}" if name else ""
        for figure, value in (figures[i] or {"value": None}).items():
            named[figure.replace("loss", "test_loss") + end] = value
        if held_out:
            named[f"held_out{end}"] = (held_out[i] or {"value": None})["value"]
    return named


def describe(figure: dict[str, float | None] | None) -> str:
    """The figures of one classifier on a line."""
    if figure is None:
        return "diverged"
    return " ".join(f"{name} {v:.4f}" for name, v in figure.items() if v is not None)
