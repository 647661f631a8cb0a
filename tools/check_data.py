"""Check a data set before a long run: what is missing, which images are bad, how many there are.

Prints a line for each problem (missing, bad) and oddity (warning), a summary of each split, and
which scripts can use the data set as it is. The exit code is 1 if there is a problem.

    python -m tools.check_data imagenet DATA [--fast]
"""

import argparse
import contextlib
import sys

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import davis, retrieval
from data.image import check_head, read_file
from data.loader import quiet_worker
from data.opening import DataPath, open_splits, open_train
from data.source import ImageFiles, ImageSource
from data.transfer import MAP, TRANSFER_SETS
from utils.arguments import command_parser
from utils.config import DEFAULTS
from utils.distributed import on_terminal, processors
from utils.errors import UserError
from utils.run import run_script

TRAIN_AND_TEST = ("train", "test")
SPLITS = {
    "imagenet": ("train", "val"),
    "davis": ("val",),
    **dict.fromkeys(retrieval.DATASETS, ("database", "queries")),
}
# images of each split, as published
OFFICIAL = {
    "imagenet": (1_281_167, 50_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "stl10": (5_000, 8_000),
    "flowers102": (2_040, 6_149),
    "pets": (3_680, 3_669),
    "food101": (75_750, 25_250),
    "cars": (8_144, 8_041),
    "caltech101": (3_060, 6_084),
    "dtd": (3_760, 1_880),
    "aircraft": (6_667, 3_333),
    "sun397": (19_850, 19_850),
    "voc2007": (5_011, 4_952),
    "places365": (1_803_460, 36_500),
    "roxford5k": (4_993, 70),
    "rparis6k": (6_322, 70),
    "davis": (1_999,),
}


def main() -> None:
    """Open each split, read its images in parallel, and report."""
    parser = command_parser(__doc__)
    parser.add_argument("dataset", choices=list(OFFICIAL), metavar="dataset", help=str([*OFFICIAL]))
    parser.add_argument("data_path", help="what --data-path of the scripts will be")
    parser.add_argument("--zip", action="store_true", help="of imagenet: read train.zip, val.zip")
    parser.add_argument("--workers", type=int, default=processors(), help="0 for none")
    parser.add_argument(
        "--fast", action="store_true", help="decode heads alone, which misses truncated images"
    )
    args = parser.parse_args()
    if args.zip and args.dataset != "imagenet":
        raise UserError(f"--zip is for imagenet, not for {args.dataset}")
    sources, missing = open_each(args)
    bad = {}
    for split, source in sources.items():
        bad[split] = check_images(source, split, args)
        summarize(args.dataset, split, source, bad[split])
    scripts = ready_for(args.dataset, sources, bad)
    ready = f"ready for {', '.join(scripts) or 'no script'}"
    bad_images = sum(bad.values())
    if missing or bad_images:
        raise UserError(
            f"{args.data_path}: {missing} missing, {bad_images} bad, see above; {ready}"
        )
    print(f"{args.data_path}: {ready}")


class Frames(ImageFiles):
    """The frames of DAVIS, each read together with its annotation."""

    def __init__(self, videos: list[davis.Video]) -> None:
        super().__init__([path for video in videos for path in video.frames])
        self.annotations = [path for video in videos for path in video.annotations]

    def read_image(self, index: int) -> Image.Image:
        """The annotation of frame ``index``, which must be of the frame's size."""
        frame = davis.read_frame(self.names[index])
        return Image.fromarray(davis.read_mask(self.annotations[index], frame.shape[:2]))


class RankedImages(ImageFiles):
    """Images that a ground truth names, each looked for when it is read."""

    def __init__(self, truth: retrieval.GroundTruth, names: list[str]) -> None:
        super().__init__(names)
        self.truth = truth

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return read_file(self.truth.path(self.names[index]))


class Problems(Dataset):
    """What is wrong with each image of ``source``: one line, or None."""

    def __init__(self, source: ImageSource, fast: bool) -> None:
        self.source, self.fast = source, fast

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> str | None:
        """Read image ``index``."""
        try:
            if not self.fast:
                self.source.read_image(index)
            else:
                check_head(self.source.read(index), self.source.names[index])
        except UserError as error:
            return str(error)
        return None


def open_each(args: argparse.Namespace) -> tuple[dict[str, ImageSource], int]:
    """The splits that can be opened, and how many cannot; prints a line for each of those.

    Training images without classes need no validation images.
    """
    sources: dict[str, ImageSource] = {}
    lines = []
    for split in SPLITS.get(args.dataset, TRAIN_AND_TEST):
        try:
            sources[split] = open_split(args, split, sources)
        except UserError as error:
            lines.append(f"missing: {split}: {error}")
    if args.dataset == "imagenet" and not (sources or args.zip):
        with contextlib.suppress(UserError):
            sources["train"] = open_train(DataPath(args.data_path), labelled=False)
            lines = ["warning: train: images without classes are for pre-training alone"]
    for line in lines:
        print(line)
    return sources, sum(line.startswith("missing") for line in lines)


def ready_for(dataset: str, sources: dict[str, ImageSource], bad: dict[str, int]) -> list[str]:
    """The scripts that can use the data set as it is.

    Args:
        dataset: its name.
        sources: the splits that could be opened.
        bad: unreadable images in each. Pre-training replaces a few, evaluations stop.
    """
    scripts = []
    train = sources.get("train")
    most_bad = DEFAULTS.DATA.MAX_BAD_FRACTION
    if train and bad["train"] <= most_bad * len(train.names):
        scripts.append("main_pretrain.py")
    if any(bad.values()) or len(sources) < len(SPLITS.get(dataset, TRAIN_AND_TEST)):
        return scripts
    if dataset not in TRANSFER_SETS:
        return ["eval_video_seg.py" if dataset == "davis" else "eval_retrieval.py"]
    if TRANSFER_SETS[dataset].metric == MAP:
        return [*scripts, "eval_linear.py"]
    if len(np.unique(sources["train"].labels)) < 2:
        return scripts
    return [*scripts, "eval_knn.py", "eval_linear.py"]


def open_split(args: argparse.Namespace, split: str, opened: dict[str, ImageSource]) -> ImageSource:
    """The images of a split; ``opened`` are those before it.

    Raises:
        UserError: what is missing or damaged.
    """
    if args.dataset == "davis":
        return Frames(davis.read_videos(args.data_path, split))
    if args.dataset in retrieval.DATASETS:
        truth = retrieval.read_ground_truth(args.data_path, args.dataset)
        names = truth.database if split == "database" else truth.queries
        return RankedImages(truth, names)
    place = DataPath(args.data_path, args.dataset, args.zip)
    if split == "train":
        return open_train(place)
    train = opened.get("train") or open_train(place)
    judged = train.labels.ndim > 1 or len(np.unique(train.labels)) > 1  # else it only trains
    return open_splits(place, labelled=judged, train=train)[1]


def check_images(source: ImageSource, split: str, args: argparse.Namespace) -> int:
    """Read every image, print a line for each bad one, and return how many there are."""
    loader = DataLoader(
        Problems(source, args.fast),
        batch_size=64,
        num_workers=args.workers,
        collate_fn=list,
        worker_init_fn=quiet_worker,
    )
    bad = 0
    with tqdm(total=len(source.names), desc=split, disable=not on_terminal()) as bar:
        try:
            for problems in loader:
                for problem in filter(None, problems):
                    bar.write(f"bad: {split}: {problem}", file=sys.stdout)
                    bad += 1
                bar.update(len(problems))
        except RuntimeError as error:  # torch's, when the system ends a worker
            raise UserError(
                f"{args.data_path}: a worker died, try --workers 1 ({error})"
            ) from error
    return bad


def summarize(dataset: str, split: str, source: ImageSource, bad: int) -> None:
    """Print what a split holds, and where it differs from the official one."""
    images, classes = len(source.names), len(source.classes)
    kinds = f" of {classes} classes" if classes else ""
    print(f"{split}: {images} images{kinds}, {bad} bad")
    official = dict(zip(SPLITS.get(dataset, TRAIN_AND_TEST), OFFICIAL[dataset], strict=True))[split]
    if images != official:
        print(f"warning: {split}: the official {dataset} has {official} images, here are {images}")
    known = TRANSFER_SETS[dataset].classes if dataset in TRANSFER_SETS else classes
    if classes != known:
        print(f"warning: {split}: the official {dataset} has {known} classes, here are {classes}")


if __name__ == "__main__":
    run_script(main)
