"""The recipes that run on the pretended GPU, and what one update of each does there.

    PYTHONPATH=tests python -m fake_cuda.recipes [NAME ...]    # a Markdown table

It runs what ``main_pretrain.py`` and ``eval_linear.py`` run: the model, optimizer, update, line of
the log, and the copies of batches to the device. For each recipe it makes two updates and a line
of the log, and counts the second.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from fake_cuda.device import (
    CUDA,
    DeviceLog,
    Parallel,
    build_guard,
    made_fake,
    pretend,
    reason_not_to_run,
)
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4  # images of a process in a micro-batch; no count follows from it
PINNED = True  # the memory of batches


@dataclass(frozen=True)
class Recipe:
    """What is trained.

    Attributes:
        method: ``synco``, ``moby``, ``byol``, or ``probe``, ``finetune``.
        encoder: a name of MODEL.ENCODER.
        launches: operators of an update, with the versions that this was last run with.
        precision: ``float32``, ``bfloat16``, or ``float16`` as on a GPU without bfloat16.
        optimizer: a name of TRAIN.OPTIMIZER.NAME.
        processes: in the group.
        micro: micro-batches of an update.
        more: further keys and values of the configuration.
    """

    method: str
    encoder: str
    launches: int
    precision: str = "bfloat16"
    optimizer: str = "adamw"
    processes: int = 2
    micro: int = 1
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What differs from other recipes."""
        parts = [self.method, self.encoder.removeprefix("timm/"), self.precision, self.optimizer]
        parts += [f"{self.processes}p"] + [f"{self.micro}micro"] * (self.micro > 1)
        keys = [k.split(".")[-1].lower() for k in self.more[::2]]
        return "-".join([*parts, *keys])


@dataclass
class Counts:
    """What the second update of a recipe does.

    Attributes:
        waits: places where the host waits for the device, with how often.
        copies: from pinned memory to the device.
        launches: operators that the device gets.
        kept: those that keep what a skipped update must not change.
        crooked: convolutions whose input is not channels last, by place.
        read: waits of a line of the log.
        seconds: that it took here.
    """

    waits: dict[str, int] = field(default_factory=dict)
    copies: int = 0
    launches: int = 0
    kept: int = 0
    crooked: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


CHECKPOINT = ("TRAIN.USE_CHECKPOINT", "True")
NORM = ("MODEL.REPLACE_LN_WITH_BN", "True")
DEVICE = ("DATA.BACKEND", "device")
PROBE = ("TRAIN.PROBE", "True")
UNCLIPPED = ("TRAIN.CLIP_GRAD", "0.0")
RECIPES = [
    Recipe("synco", "vit_tiny", 2039),
    Recipe("synco", "vit_tiny", 2114, optimizer="lars"),
    Recipe("synco", "vit_tiny", 4168, micro=2),
    Recipe("synco", "vit_nano", 948, precision="float32"),
    Recipe("synco", "vit_nano", 1220, precision="float16"),
    Recipe("synco", "vit_nano", 1399, more=CHECKPOINT),
    Recipe("synco", "vit_nano", 1170, processes=1),
    Recipe("synco", "vit_nano", 1463, more=DEVICE),
    Recipe("synco", "vit_nano", 1258, more=PROBE),
    Recipe("synco", "swin_tiny", 2609),
    Recipe("synco", "timm/resnet18", 2041, optimizer="lars"),
    Recipe("moby", "vit_nano", 948, precision="float16", optimizer="sgd"),
    Recipe("moby", "vit_nano", 727, precision="float32", optimizer="lars", more=UNCLIPPED),
    Recipe("moby", "vit_tiny", 3549, more=NORM),
    Recipe("moby", "swin_tiny", 1630, precision="float32"),
    Recipe("moby", "timm/resnet18", 3474, precision="float16", optimizer="lars", micro=2),
    Recipe("moby", "timm/resnet18", 1000, processes=1),
    Recipe("moby", "timm/resnet50", 3915),
    Recipe("byol", "vit_nano", 1338, precision="float32", micro=2),
    Recipe("byol", "vit_nano", 989, precision="float16", optimizer="lars"),
    Recipe("byol", "vit_nano", 1117, optimizer="sgd", more=CHECKPOINT),
    Recipe("byol", "swin_tiny", 3058, optimizer="lars", more=CHECKPOINT),
    Recipe("byol", "timm/resnet18", 2023, precision="float32", more=CHECKPOINT),
    Recipe("byol", "timm/resnet18", 1702, optimizer="sgd", more=UNCLIPPED),
    Recipe("probe", "vit_nano", 319, optimizer="sgd"),
    Recipe("finetune", "vit_nano", 546),
    Recipe("finetune", "vit_nano", 1078, precision="float16", micro=2),
    Recipe("finetune", "timm/resnet18", 389, processes=1),
]


def count(recipe: Recipe, folder: str) -> Counts:
    """Make two updates and a line of the log; the process has to ``pretend``."""
    import data.loader
    from logger import create_logger
    from utils.run import Run
    from utils.update import Precision

    started = time.monotonic()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: recipe.precision != "float16"
    level = "O0" if recipe.precision == "float32" else "O1"
    join_group(recipe.processes)
    torch.manual_seed(0)
    config = configured(recipe)
    run = Run(folder, CUDA, Precision(level, CUDA), create_logger(folder, 0), config)
    judged = recipe.method in ("probe", "finetune")
    getattr(data.loader, "_statistics", SimpleNamespace(cache_clear=int)).cache_clear()
    mode, log = FakeTensorMode(), DeviceLog()
    make, record = (classifying if judged else pretraining)(recipe, config, run, mode, log)
    counts = Counts()
    with mode, log:
        # the batches of a third update are copied while the second computes
        for number, micro_batches in zip(range(2), updates(recipe, config, mode), strict=False):
            result = make(micro_batches, number)
            counts.waits, counts.copies = dict(log.waits), log.copies
            counts.launches, counts.kept = sum(log.launches.values()), log.launches["kept"]
            counts.crooked = dict(log.crooked)
            log.clear()
        record(result)
    counts.read, counts.seconds = dict(log.waits), time.monotonic() - started
    return counts


def join_group(processes: int) -> None:
    """A group in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())


def configured(recipe: Recipe):
    """The configuration."""
    from evaluation.protocols import MAE, MOBY, apply_protocol
    from utils.config import load_config

    method = recipe.method if recipe.method in ("synco", "byol") else "moby"
    kind = "swin" if recipe.encoder.startswith("swin") else "vit"
    opts = ["MODEL.ENCODER", recipe.encoder, "DATA.BATCH_SIZE", str(BATCH)]
    opts += ["TRAIN.OPTIMIZER.NAME", recipe.optimizer, *recipe.more]
    opts += ["TRAIN.ACCUMULATION_STEPS", str(recipe.micro), "PRINT_FREQ", "1000"]
    weights = {"probe": "freeze", "finetune": "finetune"}.get(recipe.method)
    opts += ["LINEAR_EVAL.WEIGHTS", weights] if weights else []
    config = load_config(str(ROOT / f"configs/{method}_{kind}_tiny.yaml"), opts)
    if not weights:
        return config
    return apply_protocol(config, MOBY if weights == "freeze" else MAE, opts[::2])[0]


def pretraining(recipe: Recipe, config, run, mode: FakeTensorMode, log: DeviceLog):
    """What makes one update as ``main_pretrain.py`` does, and what writes a line of the log."""
    import main_pretrain
    from evaluation.online_probe import OnlineProbe
    from models import build_method
    from optimizer import build_optimizer
    from utils.seed import seed_step
    from utils.update import Update

    method = made_fake(build_method(config), mode)
    main_pretrain.build_method = lambda config: method
    with mode:
        model = main_pretrain.build_model(run)
        optimizer = build_optimizer(config, model, 0.1)
        ddp = Parallel(model).train()
        parts = {name: getattr(model, name) for name in main_pretrain.PARTS}
        update = Update(ddp, [optimizer], run.precision, config.TRAIN.CLIP_GRAD, parts)
    watch_kept(update, log)
    training_log, averages = log_of(run, update)
    forward = partial(main_pretrain.forward_views, ddp, CUDA, config.MODEL.WARMUP_EPOCHS)
    probe = None
    if config.TRAIN.PROBE:
        labelled = SimpleNamespace(classes=["a", "b", "c"], labels=np.zeros(3))
        with mode:
            probe = OnlineProbe(model.encoder.num_features, labelled, CUDA)
        forward = probe.learning(forward)

    def make(micro_batches, step):
        seed_step(config.SEED, 0, step)
        model.update_key_encoder(0.99)
        result = update(micro_batches, forward)
        for output in result.outputs:
            model.enqueue(*output.keys, result.finite)
        if probe:
            probe.step(result.finite)
        training_log.progress.advance()
        averages.add(result.figures, result.finite)
        return result

    return make, partial(write_line, training_log, averages, update)


def classifying(recipe: Recipe, config, run, mode: FakeTensorMode, log: DeviceLog):
    """The same as ``eval_linear.py``."""
    from eval_linear import weight_groups
    from evaluation.linear import LinearClassifiers, build_mixup, forward_images
    from models import build_encoder
    from models.batch_norm import synchronize_batch_norm
    from optimizer import build_optimizer
    from utils.seed import seed_libraries
    from utils.update import Update

    frozen = recipe.method == "probe"
    rates = [0.1, 1.0] if frozen else [1.0]
    encoder = build_encoder(config, 0.2)
    model = LinearClassifiers(encoder, 10, len(rates), 0, frozen, drops=True)
    made_fake(model, mode)
    with mode:
        model = synchronize_batch_norm(model, CUDA)
        groups = weight_groups(config, model, rates, 0.75, {})
        optimizers = [build_optimizer(config, model, 0.1, group) for group in groups]
        ddp = Parallel(model).train()
        clip = config.TRAIN.CLIP_GRAD
        update = Update(ddp, optimizers, run.precision, clip, scale=not frozen)
    watch_kept(update, log)
    names = [f"{rate:g}" for rate in rates] if frozen else [""]
    training_log, averages = log_of(run, update, names)
    mixup = None if frozen else build_mixup(config, 10)
    forward = partial(forward_images, ddp, CUDA, config.MODEL.LABEL_SMOOTHING, mixup)

    def make(micro_batches, step):
        seed_libraries(config.SEED, 0, step)
        result = update(micro_batches, forward)
        training_log.progress.advance()
        averages.add(result.figures, result.finite)
        return result

    return make, partial(write_line, training_log, averages, update)


def log_of(run, update, names=("",)):
    """The log of a run in its first epoch, where no epoch ends, and the averages for its lines."""
    from utils.progress import EpochSize, Progress
    from utils.training_log import TrainingLog
    from utils.update import Averages

    training_log = TrainingLog(run, Progress(EpochSize(100 * BATCH, BATCH)), update, names)
    training_log.open()
    return training_log, Averages(names)


def write_line(training_log, averages, update, result) -> None:
    """A line of the log, and what follows from it."""
    rows = training_log.line(averages, result, {"momentum": 0.9})
    update.check_skipped(1000, "", longest_rows(rows))


def longest_rows(rows):
    """What the line has read."""
    return rows


def watch_kept(update, log: DeviceLog) -> None:
    """Count apart what keeps the statistics that a skipped update must not change."""
    for name in ("_copy_statistics", "_restore_statistics"):
        function = getattr(update, name)

        def counted(*arguments, function=function):
            with log.of("kept"):
                return function(*arguments)

        setattr(update, name, counted)


def updates(recipe: Recipe, config, mode: FakeTensorMode) -> Iterator[list]:
    """The micro-batches of three updates, on the device as the training loader gives them."""
    from data.augmentation import ViewParameters
    from data.dataset import Views
    from data.device_views import pack
    from data.prefetch import FlatBatch, flatten, prefetch

    size = config.DATA.IMG_SIZE
    with torch.utils._python_dispatch._disable_current_modes():
        view = torch.zeros(size, size, 3, dtype=torch.uint8)
        sample = {
            "probe": (view.permute(2, 0, 1).contiguous(), 1),
            "finetune": (torch.zeros(3, size, size), 1),
        }.get(recipe.method, Views(view, view, -1, 1, torch.empty(0)))
        if config.DATA.BACKEND == "device":
            drawn = ViewParameters((0, 0, size, size), False, (), False, 0.0, False)
            sample = sample._replace(draws=pack(drawn, 2.0).expand(2, -1))
        flat = flatten([sample] * BATCH)

    def pinned() -> FlatBatch:
        memory = mode.from_tensor(flat.memory, static_shapes=True)
        memory.pinned = PINNED
        return flat._replace(memory=memory)

    yield from prefetch([pinned() for _ in range(recipe.micro)] for _ in range(3))


def main() -> None:
    """Print a table, or with ``--json`` the counts of a recipe a line."""
    if reason := reason_not_to_run():
        sys.exit(reason)
    known = {recipe.name: recipe for recipe in RECIPES}
    names = [name for name in sys.argv[1:] if name != "--json"] or list(known)
    logging.disable()
    if "--json" not in sys.argv:
        print("| recipe | waits | copies | launches | for statistics | waits of a line |")
        print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        pretend(build_guard(Path(folder)))
        for name in names:
            c = count(known[name], folder)
            waits, read = sum(c.waits.values()), sum(c.read.values())
            if "--json" in sys.argv:
                print(json.dumps({"name": name} | asdict(c)), flush=True)
            else:
                print(f"| {name} | {waits} | {c.copies} | {c.launches} | {c.kept} | {read} |")


if __name__ == "__main__":
    main()
