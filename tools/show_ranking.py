"""Draw the images that rank first for some queries, right ones blue, wrong orange, others grey.

Needs the features that eval_retrieval.py --dump-features writes; the evaluation draws such sheets
itself with --pictures.

    python -m tools.show_ranking --data-path DATA --load-features DIR [--queries 0 3] [--out FILE]
"""

import logging

from torch.nn import functional as F

from data.retrieval import DATASETS, read_ground_truth
from evaluation.feature_files import load_features
from evaluation.pictures import QUERIES, TOP, draw_rankings, save
from evaluation.retrieval_metrics import DIFFICULTIES, rank_images
from utils.arguments import add_out, command_parser, number_in
from utils.errors import UserError
from utils.run import run_script


def main() -> None:
    """Rank, draw, write."""
    parser = command_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="of the data sets")
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0], help="its name")
    parser.add_argument("--load-features", required=True, metavar="DIR", help="the features")
    first = f"numbers (default: the first {QUERIES})"
    parser.add_argument("--queries", type=int, nargs="+", metavar="N", help=first)
    parser.add_argument("--top", type=number_in(1, 1000), default=TOP, help="images a query")
    parser.add_argument(
        "--difficulty", choices=list(DIFFICULTIES), default="medium", help="what is right"
    )
    add_out(parser, "the picture (.png or .jpg)", "ranking.png")
    args = parser.parse_args()
    truth = read_ground_truth(args.data_path, args.dataset)
    count = len(truth.queries)
    numbers = args.queries or list(range(min(QUERIES, count)))
    if not all(0 <= number < count for number in numbers):
        raise UserError(f"--queries must be from 0 to {count - 1}")
    names = ("train_features.pth", "query_features.pth")
    features, _ = load_features(args.load_features, names, logging.getLogger())
    database, queries = (F.normalize(part).numpy() for part in features)
    if (len(database), len(queries)) != (len(truth.database), count):
        raise UserError(f"{args.load_features}: not the features of {args.dataset}")
    rankings = rank_images(database, queries[numbers])[:, : args.top]
    save(draw_rankings(truth, numbers, rankings, args.difficulty), args.out)
    print(f"{args.out} written")


if __name__ == "__main__":
    run_script(main)
