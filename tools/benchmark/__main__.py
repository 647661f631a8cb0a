"""Measure speed as ratios in one run, against plain forms and against the machine's limits.

What is compared runs in turn (A B A B), and medians are taken. A ratio is time over the plain
form's time. A speedup is its inverse. A share is of the limit measured in the same run.

    python -m tools.benchmark step head --json FILE --markdown FILE
"""

import json
from pathlib import Path

import torch

from tools.benchmark.data import knn, pipeline
from tools.benchmark.gpu import gpu, table
from tools.benchmark.training import head, momentum, scaling, step
from utils.arguments import command_parser
from utils.run import run_script

PARTS = {f.__name__: f for f in (head, step, pipeline, momentum, knn, scaling, gpu)}


def main() -> None:
    """Run the parts that are named, by default all but ``gpu``."""
    parser = command_parser(__doc__)
    usual = [name for name in PARTS if name != "gpu"]
    about = f"of {', '.join(PARTS)} (default: all but gpu)"
    parser.add_argument("parts", nargs="*", metavar="PART", help=about)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--markdown", metavar="FILE", help="write tables there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    for flag, value, what in (
        ("rounds", 5, "timed runs of each"),
        ("warm-up", 3, "runs of steps and heads that do not count"),
        ("batch", 16, "images of a step"),
        ("size", 224, "side of an image in pixels"),
        ("head-batch", 128, "queries of the head"),
        ("queue", 4096, "length of the queue"),
        ("hard", 256, "N_HARD"),
        ("negatives", 128, "synthetic negatives of each type"),
        ("images", 48, "JPEGs of the pipeline"),
        ("features", 40000, "training features of k-NN"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=value, metavar="N", help=what)
    parser.add_argument(
        "--encoders", nargs="+", default=["vit_small", "swin_tiny"], help="of steps"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}, choose from {', '.join(PARTS)}")
    if args.quick:
        args.rounds, args.warm_up, args.batch, args.size, args.head_batch = 1, 1, 2, 32, 4
        args.queue, args.hard, args.negatives = 64, 8, 4
        args.images, args.features = 2, 4000
    args.device = "cuda" if torch.cuda.is_available() else "cpu"

    results = {name: PARTS[name](args) for name in args.parts or usual}
    rows = [
        f"| {name} | {value if isinstance(value, str) else format(value, '.3g')} |"
        for name, value in flatten({k: v for k, v in results.items() if k != "gpu"})
    ]
    text = "\n".join(["| figure | value |", "| --- | --- |", *rows]) if rows else ""
    if "gpu" in results:
        text = f"{table(results['gpu'])}\n{text}"
    print(text)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")


def flatten(results: dict, prefix: str = "") -> list[tuple[str, float | str]]:
    """Nested results as (dotted name, value)."""
    pairs: list[tuple[str, float | str]] = []
    for name, value in results.items():
        nested = isinstance(value, dict)
        pairs += flatten(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return pairs


if __name__ == "__main__":
    run_script(main)
