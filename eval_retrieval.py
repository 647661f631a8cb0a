"""Judge an encoder by image retrieval on revisited Oxford and Paris.

    python eval_retrieval.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA holds roxford5k/gnd_roxford5k.pkl and roxford5k/jpg/, or those of rparis6k (--dataset).
"""

import argparse
import math
import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from yacs.config import CfgNode

from data.loader import num_workers
from data.retrieval import DATASETS, LABELS, GroundTruth, RetrievalImages, read_ground_truth
from evaluation.feature_files import add_feature_arguments, dump_features, load_features
from evaluation.features import check_features, extract_features
from evaluation.identity import as_flags, identified, identity, identity_said
from evaluation.of_run import log_notes, parse_evaluation
from evaluation.retrieval_features import AsDino, MultiScale
from evaluation.retrieval_metrics import DIFFICULTIES, rank_images, score_difficulty
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import TRAINING, number_in
from utils.config import NETWORK, run_folder
from utils.distributed import rank
from utils.errors import UserError
from utils.provenance import cost, describe_images, gather_provenance
from utils.run import Run, log_table, run_script, start, write_pictures, write_results

FILES = ("train_features.pth", "query_features.pth")  # of the database and of the queries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    parser.add_argument(
        "--dataset",
        dest="DATA.DATASET",
        choices=DATASETS,
        default=DATASETS[0],
        help="which of the two",
    )
    text = "longest side of an image in pixels"
    parser.add_argument("--imsize", type=number_in(1, 10**5), default=224, help=text)
    parser.add_argument(
        "--multiscale", action="store_true", help="average the features of three sizes"
    )
    parser.add_argument(
        "--crop-query", action="store_true", help="crop queries to their box, as is official"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="draw the images that rank first for some queries"
    )
    add_feature_arguments(parser)


def main() -> None:
    """Features of the database and of the queries, ranking, figures."""
    args, config, notes = parse_evaluation(__doc__, add_arguments, TRAINING)
    dataset = config.DATA.DATASET
    run = start(config, os.path.join(run_folder(config), f"retrieval_{dataset}"))
    log_notes(run, notes)
    truth = read_ground_truth(config.DATA.DATA_PATH, dataset)
    if args.load_features:
        features, about = load_features(args.load_features, FILES, run.logger)
        dumped = identity_said(about["provenance"]).get("--dataset", dataset)
        if dumped != dataset:
            raise UserError(f"{args.load_features}: features of {dumped}, not of {dataset}")
    else:
        features, about = encode(args, config, truth, run)
        if args.dump_features and rank() == 0:
            dump_features(args.dump_features, dict(zip(FILES, features, strict=True)), about)
    database, queries = features
    check(database, queries, truth)
    data = facts(truth)
    if about["provenance"].get("data", data) != data:
        run.logger.warning("the features are of other images than those of %s", dataset)
    if rank() == 0:
        rankings = rank_images(F.normalize(database).numpy(), F.normalize(queries).numpy())
        results = score(rankings, truth) | {"protocol": about["protocol"]}
        origin = about["provenance"]
        provenance = identified(run, origin, data, identity_said(origin))
        report({"dataset": dataset} | results, provenance, run)
        if args.pictures:
            scored = [name for name, figure in results["mAP"].items() if figure is not None]
            write_pictures(run, partial(draw, truth, rankings, scored))


def facts(truth: GroundTruth) -> dict[str, Any]:
    """The digest and the numbers of the images and of what is right for each query."""
    lists = [query[kind] for query in truth.labels for kind in LABELS]
    labels = np.concatenate([[len(numbers), *numbers] for numbers in lists])
    return describe_images("", database=(truth.database, []), queries=(truth.queries, labels))


def encode(
    args: argparse.Namespace, config: CfgNode, truth: GroundTruth, run: Run
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Features of the database (N, F) and of the queries (Q, F), L2-normalised.

    Also the ``protocol`` and the ``provenance`` of their manifest.
    """
    parts = [RetrievalImages(truth, q, args.imsize, args.crop_query) for q in (False, True)]
    loaded, origin = load_pretrained_encoder(args, config, run)
    encoder: nn.Module = AsDino(loaded)
    encoder = MultiScale(encoder) if args.multiscale else encoder
    protocol = {name: getattr(args, name) for name in ("imsize", "multiscale", "crop_query")}
    data, flags = facts(truth), {"--dataset": config.DATA.DATASET} | as_flags(protocol)
    of = identity(run, config, NETWORK, origin, data, **flags)
    provenance = gather_provenance(run.effective, run.device, origin, data) | {"identity": of}
    features = [
        # images of many sizes, so one at a time
        extract_features(
            encoder,
            images,
            run,
            batch_size=1,
            num_workers=num_workers(config),
            label="queries" if number else "database",
        )[0]
        for number, images in enumerate(parts)
    ]
    provenance |= cost(run.device, run.started)
    return features, {"protocol": protocol, "provenance": provenance}


def check(database: torch.Tensor, queries: torch.Tensor, truth: GroundTruth) -> None:
    """Refuse features that are not of these images."""
    check_features(database, torch.empty(len(truth.database)), "database")
    check_features(queries, torch.empty(len(truth.queries)), "query")
    if database.shape[1] != queries.shape[1]:
        raise UserError(
            f"database features have {database.shape[1]} values, query features {queries.shape[1]}"
        )


def score(rankings: np.ndarray, truth: GroundTruth) -> dict:
    """``mAP`` and ``mP@k`` by difficulty in per cent; None where no query has positives."""
    results: dict[str, dict[str, Any]] = {"mAP": {}, "mP@k": {}}
    for difficulty in DIFFICULTIES:
        scores = score_difficulty(rankings, truth.labels, difficulty)
        results["mAP"][difficulty] = per_cent(scores["mAP"])
        results["mP@k"][difficulty] = {str(k): per_cent(v) for k, v in scores["mP@k"].items()}
    return results


def per_cent(share: float) -> float | None:
    """NaN is no JSON."""
    return None if math.isnan(share) else 100 * share


def report(results: dict, provenance: dict[str, Any], run: Run) -> None:
    """Log the figures and write results.json."""
    rows: list[list[str]] = []
    for difficulty, precision in results["mAP"].items():
        if precision is None:
            run.logger.warning("%s: no query has images to find", difficulty)
            continue
        figures = {"mAP": precision}
        figures |= {f"mP@{k}": value for k, value in results["mP@k"][difficulty].items()}
        rows = rows or [["", *(f"{name} %" for name in figures)]]
        rows.append([difficulty, *(f"{value:.2f}" for value in figures.values())])
    if rows:
        log_table(run, rows)
    write_results(run, results, provenance)


def draw(truth: GroundTruth, rankings: np.ndarray, difficulties: list[str], folder: str) -> None:
    """Draw the images that rank first for queries evenly spread over the list, for each difficulty.

    Args:
        truth: names, labels and boxes.
        rankings: (Q, N), numbers of images, the best first.
        difficulties: keys of ``DIFFICULTIES``.
        folder: gets the sheets.
    """
    from evaluation.pictures import QUERIES, TOP, draw_rankings, save  # few runs need matplotlib

    count = min(QUERIES, len(rankings))
    numbers = [i * len(rankings) // count for i in range(count)]
    for difficulty in difficulties:
        sheet = draw_rankings(truth, numbers, rankings[numbers, :TOP], difficulty)
        save(sheet, os.path.join(folder, f"ranking_{difficulty}.png"))


if __name__ == "__main__":
    run_script(main)
