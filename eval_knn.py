"""Judge an encoder by weighted k-nearest neighbours of its features."""

import argparse
import os

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from data.loader import add_dataset_arguments, build_labelled_sources
from data.transfer import TRANSFER_SETS
from evaluation.classification_metrics import MAP
from evaluation.features import check_features, encode_images
from evaluation.knn import knn_classify
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import parse_arguments
from utils.checkpoint import read_tensor, save_checkpoint
from utils.config import run_folder
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.run import Run, run_script, start, write_results

# features and labels of the training images, then of the test images
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument("--nb-knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--dump-features", metavar="DIR", help="write the features there")
    parser.add_argument("--load-features", metavar="DIR", help="use the features there")


def main() -> None:
    """Features of both splits, neighbours, figures."""
    args, config = parse_arguments(__doc__, add_arguments)
    run = start(config, os.path.join(run_folder(config), f"knn_{config.DATA.DATASET}"))
    if args.load_features:
        parts = [read_tensor(os.path.join(args.load_features, name)) for name in FILES]
    else:
        parts = encode(args, config, run)
        if args.dump_features and rank() == 0:
            os.makedirs(args.dump_features, exist_ok=True)
            for name, tensor in zip(FILES, parts, strict=True):
                save_checkpoint(tensor, os.path.join(args.dump_features, name))
    train, train_labels, test, test_labels = parts
    check(train, train_labels, test, test_labels)
    train, train_labels = train.to(run.device), train_labels.to(run.device)
    try:
        figures = accuracies(train, train_labels, test, test_labels, args.nb_knn, args.temperature)
    except ValueError as error:
        raise UserError(str(error)) from error

    for k, figure in figures.items():
        run.logger.info("%s-NN: top-1 %.2f%% top-5 %.2f%%", k, figure["top1"], figure["top5"])
    results = {"dataset": config.DATA.DATASET, "temperature": args.temperature, "knn": figures}
    write_results(run, results)


def encode(args: argparse.Namespace, config: CfgNode, run: Run) -> list[torch.Tensor]:
    """Features and labels of the training images, then of the test images."""
    sources = build_labelled_sources(config, args.download)
    if TRANSFER_SETS[config.DATA.DATASET].metric == MAP:
        raise UserError(
            f"k-NN needs one class an image, those of {config.DATA.DATASET} have several: "
            "use eval_linear.py"
        )
    encoder = load_pretrained_encoder(args, config, run)
    return [
        tensor
        for source in sources
        for tensor in encode_images(config, encoder, source, run, normalize=True)
    ]


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


def accuracies(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    ks: list[int],
    temperature: float,
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 in per cent for each k; each process classifies its part of the tests."""
    own = slice(rank(), None, world_size())
    ranked = knn_classify(
        train_features,
        train_labels,
        test_features[own],
        sorted(set(ks)),
        temperature,
        int(train_labels.max()) + 1,
    )
    figures = {}
    for k, classes in ranked.items():
        hits = classes == test_labels[own, None]
        right = torch.stack([hits[:, :1].sum(), hits.sum()]).to(train_features.device)
        dist.all_reduce(right)
        top1, top5 = (100 * right.double() / len(test_labels)).tolist()
        figures[str(k)] = {"top1": top1, "top5": top5}
    return figures


if __name__ == "__main__":
    run_script(main)
