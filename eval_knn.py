"""Judge an encoder by weighted k-nearest neighbours of its features."""

import argparse
import json
import os

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from data.features import extract_features
from data.loader import build_source, build_test_images, num_workers
from models.knn import knn_classify
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import parse_arguments
from utils.checkpoint import read_tensor, save_checkpoint
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.launch import Run, run_script, start

# features and labels of the training images, then of the test images
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    parser.add_argument("--nb-knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--dump-features", metavar="DIR", help="write the features there")
    parser.add_argument("--load-features", metavar="DIR", help="use the features there")


def main() -> None:
    """Features of both splits, neighbours, figures."""
    args, config = parse_arguments(__doc__, add_arguments)
    run = start(config, os.path.join(config.OUTPUT, f"knn_{config.DATA.DATASET}"))
    if args.load_features:
        parts = [read_tensor(os.path.join(args.load_features, name)) for name in FILES]
    else:
        parts = encode(args, config, run)
        if args.dump_features and rank() == 0:
            os.makedirs(args.dump_features, exist_ok=True)
            for name, tensor in zip(FILES, parts, strict=True):
                save_checkpoint(tensor, os.path.join(args.dump_features, name))
    check(*parts)
    try:
        figures = accuracies(*parts, args.nb_knn, args.temperature, run.device)
    except ValueError as error:
        raise UserError(str(error)) from error

    for k, figure in figures.items():
        run.logger.info("%s-NN: top-1 %.2f%% top-5 %.2f%%", k, figure["top1"], figure["top5"])
    results = {
        "dataset": config.DATA.DATASET,
        "temperature": args.temperature,
        "knn": figures,
    }
    if rank() == 0:
        with open(os.path.join(run.folder, "results.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


def encode(args: argparse.Namespace, config: CfgNode, run: Run) -> list[torch.Tensor]:
    """Features and labels of the training images, then of the test images."""
    sources = [build_source(config, split) for split in ("train", "val")]
    encoder = load_pretrained_encoder(args, config, run)
    parts = []
    for source in sources:
        parts += extract_features(
            encoder,
            build_test_images(config, source),
            run,
            batch_size=config.DATA.BATCH_SIZE,
            num_workers=num_workers(config),
        )
    return parts


def check(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
) -> None:
    """Refuse what would give figures that mean nothing."""
    for name, features, labels in (
        ("training", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
            raise UserError(
                f"{name} features {tuple(features.shape)} and labels {tuple(labels.shape)}: need "
                "one row of features and one class for each image"
            )
        if not features.isfinite().all():
            bad = int((~features.isfinite()).any(1).nonzero()[0])
            raise UserError(f"the {name} features of image {bad} are not finite")
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
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 in per cent for each k; each process classifies its part of the tests."""
    own = slice(rank(), None, world_size())
    ranked = knn_classify(
        train_features.to(device),
        train_labels.to(device),
        test_features[own],
        sorted(set(ks)),
        temperature,
        int(train_labels.max()) + 1,
    )
    figures = {}
    for k, classes in ranked.items():
        hits = classes == test_labels[own, None]
        right = torch.stack([hits[:, :1].sum(), hits.sum()]).to(device)
        dist.all_reduce(right)
        top1, top5 = (100 * right.double() / len(test_labels)).tolist()
        figures[str(k)] = {"top1": top1, "top5": top5}
    return figures


if __name__ == "__main__":
    run_script(main)
