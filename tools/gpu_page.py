"""Run the tests and the benchmark of a GPU node, and write one page of what they found.

python -m tools.gpu_page gpu.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tools.benchmark.gpu import table
from utils.distributed import processors

ROOT = Path(__file__).parent.parent
LINES = 200  # of the tests' output that the page has at most


def main() -> None:
    """Tests, then the benchmark; ends with exit code 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", help="the Markdown file to write")
    parser.add_argument("--batch", type=int, default=128, help="images of an update (128)")
    parser.add_argument("--encoders", nargs="+", default=["vit_small", "swin_tiny"])
    parser.add_argument("--tests", nargs="+", default=["tests"], help="of which files (tests)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also on a CPU")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here")

    # tests of tiny runs leave a GPU idle for most of the time
    at_a_time = str(min(processors(), 12))
    options = ["-m", "gpu", "-n", at_a_time, "--dist", "worksteal"]
    options += ["-rfEs", "--tb=short", "--show-capture=no"]
    tests = run("pytest", *options, *args.tests, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        options = ["--batch", str(args.batch), "--encoders", *args.encoders, "--json", str(path)]
        benchmark = run("tools.benchmark", "gpu", *options, *["--quick"] * args.quick)
        results = json.loads(path.read_text()) if path.exists() else None
    found = table(results["gpu"]) if results else _quoted(benchmark.stdout)
    Path(args.page).write_text(page(tests.stdout, found))
    print(f"{args.page} written")
    sys.exit(1 if tests.returncode or benchmark.returncode else 0)


def run(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a module, and show its output as it comes; ``stdout`` has it too."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return subprocess.CompletedProcess(command, process.returncode, "".join(lines))


def page(tests: str, benchmark: str) -> str:
    """The page: what the machine is, the benchmark's tables, and the end of the tests' output."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = f"{len(names)} x {names[0]}" if names else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", CUDA {torch.version.cuda}" if names else ""
    return f"""# {device}

{versions}

Measured on this machine. The share is of the vendor's figure for dense products, which
`tools/benchmark/gpu.py` lists.

{benchmark}
## Tests

{_quoted(tests)}"""


def _quoted(output: str) -> str:
    """The last lines of a program's output, as code."""
    lines = ["    " + line for line in output.splitlines()[-LINES:]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    main()
