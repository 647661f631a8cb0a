"""Judge an encoder by weighted k-nearest neighbours of its features.

    python eval_knn.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA holds train/<class>/<image> and val/<class>/<image>; --dataset NAME reads other sets.
"""

import argparse
import math
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from data.opening import DataPath, add_dataset_arguments, open_splits
from data.source import ImageSource
from data.subset import add_subset_argument, subset_suffix, take_subset
from data.transfer import TRANSFER_SETS
from evaluation.baselines import BASELINES
from evaluation.classification_metrics import MAP
from evaluation.feature_files import (
    add_feature_arguments,
    dump_features,
    load_features,
    read_manifest,
)
from evaluation.features import check_features, encode_images, unit_length
from evaluation.identity import identity, identity_said, warn_of_replacing
from evaluation.knn import knn_classify
from evaluation.of_run import log_notes, parse_evaluation
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import TRAINING
from utils.config import FEATURE, NETWORK, run_folder
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.provenance import cost, describe_images, gather_provenance
from utils.run import Run, log_table, run_script, start, write_pictures, write_results

# features and labels of the training images, then of the test images
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    add_subset_argument(parser)
    parser.add_argument(
        "--nb-knn",
        type=int,
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of neighbours",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="of the neighbours' weights"
    )
    parser.add_argument(
        "--baseline", choices=list(BASELINES), help="judge these features instead of an encoder's"
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="draw right and wrong neighbours, and the classes that are confused most",
    )
    add_feature_arguments(parser)


def main() -> None:
    """Features of both splits, neighbours, figures."""
    args, config, notes = parse_evaluation(__doc__, add_arguments, TRAINING)
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature must be positive and finite, got {args.temperature}")
    if args.subset and args.load_features:
        raise UserError("--subset chooses among images: leave it out with --load-features")
    if args.pictures and args.load_features:
        raise UserError("--pictures shows images: leave it out with --load-features")
    if min(args.nb_knn) < 1:
        raise UserError(f"--nb-knn must be from 1, got {min(args.nb_knn)}")
    baseline, subset = args.baseline, subset_suffix(args.subset)
    if args.load_features:
        baseline, subset = features_of(args, config)
    name = f"knn_{config.DATA.DATASET}{subset}" + (f"_{baseline}" if baseline else "")
    run = start(config, os.path.join(run_folder(config), name))
    log_notes(run, notes)
    if args.load_features:
        images, (parts, about) = None, load_features(args.load_features, FILES, run.logger)
    else:
        images, parts, about = encode(args, config, run)
        if args.dump_features and rank() == 0:
            dump_features(args.dump_features, dict(zip(FILES, parts, strict=True)), about)
    train, train_labels, test, test_labels = parts
    check(train, train_labels, test, test_labels)
    if args.load_features:
        train, test = unit_length(train, "training"), unit_length(test, "test")
    train, train_labels = train.to(run.device), train_labels.to(run.device)
    try:
        ranked = classify(train, train_labels, test, args.nb_knn, args.temperature)
    except ValueError as error:
        raise UserError(str(error)) from error

    figures = accuracies(ranked, test_labels, run.device)
    rows = [[k, f"{figure['top1']:.2f}", f"{figure['top5']:.2f}"] for k, figure in figures.items()]
    log_table(run, [["k", "top-1 %", "top-5 %"], *rows])
    results = {"dataset": config.DATA.DATASET, "temperature": args.temperature, "knn": figures}
    origin = about["provenance"]  # of the encoder, and the images
    provenance = gather_provenance(run.effective, run.device, origin, origin.get("data"))
    provenance["identity"] = identity_said(origin) | {"--temperature": args.temperature}
    warn_of_replacing(run, provenance["identity"])
    protocol = {k: v for k, v in about["protocol"].items() if k != "dataset"}
    write_results(run, results | {"protocol": protocol}, provenance)
    if args.pictures and images:
        k = args.nb_knn[0]
        judged = everyones(ranked[k][:, 0], len(test), run.device)
        write_pictures(run, partial(draw, images, (train, test), judged, k, config.SEED))


def features_of(args: argparse.Namespace, config: CfgNode) -> tuple[str | None, str]:
    """The baseline and the subset that the features of ``--load-features`` are of.

    Raises:
        UserError: the command line names another data set or baseline.
    """
    about, folder = read_manifest(args.load_features), args.load_features
    dataset = about.get("protocol", {}).get("dataset", config.DATA.DATASET)
    if dataset != config.DATA.DATASET:
        raise UserError(f"{folder}: features of {dataset}: give --dataset {dataset}")
    origin = about.get("provenance", {})
    of = origin.get("encoder", args.baseline)
    if args.baseline and of != args.baseline:
        raise UserError(f"{folder}: features of {of}: leave --baseline {args.baseline} out")
    subset = str(identity_said(origin).get("--subset") or "")
    return (of if of in BASELINES else None), subset


def encode(
    args: argparse.Namespace, config: CfgNode, run: Run
) -> tuple[tuple[ImageSource, ImageSource], list[torch.Tensor], dict[str, Any]]:
    """The training and the test images, the tensors of ``FILES``, and what these are of.

    The latter are the ``protocol`` and the ``provenance`` of a manifest.
    """
    train, test = open_splits(DataPath.of(config), args.download)
    sources = (take_subset(train, args.subset, config.SEED), test)
    if TRANSFER_SETS[config.DATA.DATASET].metric == MAP:
        raise UserError(
            f"k-NN needs one class an image, those of {config.DATA.DATASET} have several: "
            "use eval_linear.py"
        )
    if args.baseline:
        encoder, origin = BASELINES[args.baseline](), {"encoder": args.baseline}
    else:
        encoder, origin = load_pretrained_encoder(args, config, run)
    if max(args.nb_knn) > (count := len(sources[0].names)):
        raise UserError(f"--nb-knn {max(args.nb_knn)} is more than the {count} training images")
    data = describe_images(
        config.DATA.DATA_PATH,
        **{n: (s.names, s.labels) for n, s in zip(("train", "test"), sources, strict=True)},
    )
    provenance = gather_provenance(run.effective, run.device, origin, data)
    flags = {"--baseline": args.baseline, "--subset": subset_suffix(args.subset)}
    provenance["identity"] = identity(run, config, NETWORK | FEATURE, origin, data, **flags)
    parts = [
        tensor
        for source in sources
        for tensor in encode_images(config, encoder, source, run, normalize=True)
    ]
    provenance |= cost(run.device, run.started)
    protocol = {"dataset": config.DATA.DATASET, "image_size": config.DATA.IMG_SIZE}
    about = {"protocol": protocol, "provenance": provenance}
    return sources, parts, about


def check(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
) -> None:
    """Refuse what would give figures that mean nothing."""
    check_features(train_features, train_labels, "training")
    check_features(test_features, test_labels, "test")
    if train_labels.ndim > 1 or test_labels.ndim > 1:
        raise UserError("k-NN needs one class an image; several labels are for eval_linear.py")
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise UserError(f"class {unknown[0]} is among the test images, but has no training image")


def classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    ks: list[int],
    temperature: float,
) -> dict[int, torch.Tensor]:
    """The best classes of this process's part of the tests for each k, see ``knn_classify``."""
    own = test_features[rank() :: world_size()]
    classes = int(train_labels.max()) + 1
    return knn_classify(train_features, train_labels, own, sorted(set(ks)), temperature, classes)


def accuracies(
    ranked: dict[int, torch.Tensor], test_labels: torch.Tensor, device: torch.device
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 in per cent for each k, from the classes that each process has found."""
    figures = {}
    for k, classes in ranked.items():
        hits = classes == test_labels[rank() :: world_size(), None]
        right = torch.stack([hits[:, :1].sum(), hits.sum()]).to(device)
        dist.all_reduce(right)
        top1, top5 = (100 * right.double() / len(test_labels)).tolist()
        figures[str(k)] = {"top1": top1, "top5": top5}
    return figures


def everyones(own: torch.Tensor, total: int, device: torch.device) -> torch.Tensor:
    """The numbers of all test images, (total,), from those of each process's part."""
    numbers = torch.zeros(total, dtype=own.dtype, device=device)
    numbers[rank() :: world_size()] = own.to(device)
    dist.all_reduce(numbers)
    return numbers.cpu()


def draw(
    images: tuple[ImageSource, ImageSource],
    features: tuple[torch.Tensor, torch.Tensor],
    judged: torch.Tensor,
    k: int,
    seed: int,
    folder: str,
) -> None:
    """Draw what k-NN has found into ``folder``, the first k that is asked for."""
    from evaluation.pictures import draw_confusion, draw_judged, save  # few runs need matplotlib

    said = judged.numpy()
    save(draw_judged(*images, features, said, k, seed), os.path.join(folder, "neighbours.png"))
    test = images[1]
    if matrix := draw_confusion(test.labels, said, test.classes, k):
        save(matrix, os.path.join(folder, "confusion.png"))


if __name__ == "__main__":
    run_script(main)
