"""What a training run reports: lines of the log, and the same figures in metrics.jsonl."""

import torch
from yacs.config import CfgNode

from utils.collapse import collapsed, queue_spread
from utils.launch import Run
from utils.measure import duration, memory
from utils.metrics import MetricsFile
from utils.progress import images_per_update
from utils.trackers import open_trackers


class TrainingLog:
    """Writes the figures of a run, and warns of skipped updates and of a collapse.

    Args:
        config: its configuration.
        run: its folder, device and log.
        optimizer: has the learning rate.
        dim: dimensions of the features.
        steps_per_epoch: updates of an epoch.
        step: updates made so far.
    """

    def __init__(
        self,
        config: CfgNode,
        run: Run,
        optimizer: torch.optim.Optimizer,
        dim: int,
        steps_per_epoch: int,
        step: int,
    ) -> None:
        self.config, self.run, self.optimizer, self.dim = config, run, optimizer, dim
        self.steps_per_epoch = steps_per_epoch
        self.metrics = MetricsFile(run.folder, step, run.logger)
        self.trackers = open_trackers(config, run, step)
        self._collapsed = False

    def line(
        self,
        epoch: int,
        step: int,
        means: dict[str, float],
        seconds: float,
        queues: tuple[torch.Tensor, ...],
    ) -> None:
        """One line for the updates since the one before.

        Args:
            epoch, step: the epoch, and the updates made so far.
            means: from ``Averages``, and whatever else is to be reported.
            seconds: that an update took.
            queues: of the method, (dim, K) each, if it has any.
        """
        epochs, logger = self.config.TRAIN.EPOCHS, self.run.logger
        means = {"lr": self.optimizer.param_groups[0]["lr"]} | means
        if queues:
            means["queue_spread"] = queue_spread(queues)
        speed = {
            "seconds": seconds,
            "images_per_s": images_per_update(self.config) / seconds,
            "memory_mb": memory(self.run.device),
            "eta_s": seconds * (epochs * self.steps_per_epoch - step),
        }
        self._write("train", epoch, step, means | speed)
        logger.info(
            "Train: [%d/%d][%d/%d] eta %s time %.4f images/s %.1f mem %.0fMB %s",
            *(epoch, epochs, step - epoch * self.steps_per_epoch, self.steps_per_epoch),
            *(duration(speed["eta_s"]), seconds, speed["images_per_s"], speed["memory_mb"]),
            " ".join(f"{name} {value:.6g}" for name, value in means.items()),
        )
        self._warn(means)

    def epoch(self, epoch: int, step: int, seconds: float, figures: dict[str, float]) -> None:
        """One line at the end of an epoch, of what this start of the program did of it.

        Args:
            epoch, step: as for ``line``.
            seconds: that the training took.
            figures: of the encoder after the epoch.
        """
        self._write("epoch", epoch, step, {"seconds": seconds} | figures)
        self.run.logger.info(
            "EPOCH %d training takes %s%s",
            *(epoch, duration(seconds)),
            "".join(f" {name} {value:.4f}" for name, value in figures.items()),
        )

    def _write(self, kind: str, epoch: int, step: int, figures: dict[str, float]) -> None:
        # the number of epochs made, a fraction within one, serves as the time axis
        place = {"epoch": epoch, "step": step, "epochs": step / self.steps_per_epoch}
        self.metrics.write(kind, place | figures)
        for tracker in self.trackers:
            tracker.write(kind, step, figures)

    def _warn(self, means: dict[str, float]) -> None:
        logger, before = self.run.logger, self._collapsed
        if means["skipped"]:
            logger.warning(
                "updates skipped, as loss or gradient was not finite: %d", means["skipped"]
            )
        self._collapsed = collapsed(means.get("feature_std", 1.0), self.dim)
        if self._collapsed and not before:
            logger.warning(
                "collapsed: the features of all images are nearly the same (standard deviation "
                "%.2g, spread evenly it would be %.2g): lower TRAIN.BASE_LR",
                *(means["feature_std"], self.dim**-0.5),
            )
