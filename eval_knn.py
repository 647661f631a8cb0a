"""Judge an encoder by weighted k-nearest neighbours of its features.

    python eval_knn.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA holds train/<class>/<image> and val/<class>/<image>; --dataset NAME reads other sets.
"""

import argparse
import os
from functools import partial
from typing import Any

import torch
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
from evaluation.identity import identified, identity, identity_said
from evaluation.knn import knn_classify
from evaluation.of_run import log_notes, parse_evaluation
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import TRAINING, number_in
from utils.config import FEATURE, NETWORK, run_folder
from utils.distributed import all_gather_objects, rank, world_size
from utils.errors import UserError
from utils.provenance import cost, describe_images, gather_provenance
from utils.run import Run, log_table, run_script, start, write_pictures, write_results

KS = [10, 20, 100, 200]
# features and labels of the training images, then of the test images
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    add_subset_argument(parser)
    parser.add_argument(
        "--nb-knn",
        type=number_in(1, 10**9),
        nargs="+",
        metavar="K",
        help="numbers of neighbours (default: 10 20 100 200, as far as there are images)",
    )
    parser.add_argument(
        "--temperature", type=number_in(1e-9, 1e9), default=0.07, help="of the neighbours' weights"
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
    if args.load_features and (args.subset or args.pictures):
        raise UserError("--subset and --pictures need images: leave them out with --load-features")
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
    ks = neighbours(args.nb_knn, len(train))
    if not args.nb_knn and ks != KS:
        run.logger.info("--nb-knn %s: there are %d training images", ks, len(train))
    ranked = classify(train, train_labels, test, ks, args.temperature)

    figures = accuracies(ranked, test_labels)
    rows = [[k, f"{figure['top1']:.2f}", f"{figure['top5']:.2f}"] for k, figure in figures.items()]
    log_table(run, [["k", "top-1 %", "top-5 %"], *rows])
    results = {"dataset": config.DATA.DATASET, "temperature": args.temperature, "knn": figures}
    origin = about["provenance"]  # of the encoder, and the images
    of = identity_said(origin) | {"--temperature": args.temperature}
    provenance = identified(run, origin, origin.get("data"), of)
    protocol = {k: v for k, v in about["protocol"].items() if k != "dataset"}
    write_results(run, results | {"protocol": protocol}, provenance)
    if args.pictures and images:
        judged = ranked[ks[0]][:, 0]
        write_pictures(run, partial(draw, images, (train, test), judged, ks[0], config.SEED))


def neighbours(asked: list[int] | None, count: int) -> list[int]:
    """The numbers of neighbours among ``count`` training images: those asked for, or fitting ones.

    Raises:
        UserError: there are fewer images.
    """
    if asked and max(asked) > count:
        raise UserError(f"--nb-knn {max(asked)} is more than the {count} training images")
    return asked or [k for k in KS if k <= count] or [count]


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
    neighbours(args.nb_knn, len(sources[0].names))  # before all are encoded
    data = describe_images(
        config.DATA.DATA_PATH,
        **{n: (s.names, s.labels) for n, s in zip(("train", "test"), sources, strict=True)},
    )
    flags = {"--baseline": args.baseline, "--subset": subset_suffix(args.subset)}
    of = identity(run, config, NETWORK | FEATURE, origin, data, **flags)
    provenance = gather_provenance(run.effective, run.device, origin, data) | {"identity": of}
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
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"training features have {train_features.shape[1]} values, test features "
            f"{test_features.shape[1]}"
        )
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
    """The best classes of the test images for each k, see ``knn_classify``.

    Each process judges a part of them.
    """
    own, classes = test_features[rank() :: world_size()], int(train_labels.max()) + 1
    ranked = knn_classify(train_features, train_labels, own, sorted(set(ks)), temperature, classes)
    parts = all_gather_objects(ranked)
    whole = {k: found.new_empty(len(test_features), found.shape[1]) for k, found in ranked.items()}
    for number, part in enumerate(parts):
        for k, found in part.items():
            whole[k][number :: len(parts)] = found
    return whole


def accuracies(
    ranked: dict[int, torch.Tensor], test_labels: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 in per cent for each k."""
    figures = {}
    for k, classes in ranked.items():
        hits = classes == test_labels[:, None]
        right = torch.stack([hits[:, 0].sum(), hits.sum()])
        top1, top5 = (100 * right.double() / len(test_labels)).tolist()
        figures[str(k)] = {"top1": top1, "top5": top5}
    return figures


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
