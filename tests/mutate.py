"""Change the code in small ways, one at a time, and see whether the quick tests notice.

    python tests/mutate.py models evaluation data utils --count 200 --seed 0 --out mutants.json

A mutant has one operator, number, comparison or condition changed, or one statement dropped. The
quick tests that execute its line run against it, those of the module's own test file first, until
one fails. A mutant that all of them pass has survived.
"""

import argparse
import ast
import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOOK = Path(__file__).parent / "mutant"
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Add,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr,
}  # fmt: skip
SECONDS = 15.0  # of tests for a mutant: later ones rarely see what the first did not


@dataclass(frozen=True)
class Mutant:
    """The change number ``variant`` of the node number ``node`` of a file."""

    path: str
    node: int
    variant: int
    line: int
    what: str

    def source(self) -> str:
        """The changed file."""
        tree = ast.parse((ROOT / self.path).read_text(encoding="utf-8"))
        _change(list(ast.walk(tree))[self.node], self.variant)
        return ast.unparse(ast.fix_missing_locations(tree))


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    skipped = {id(child) for node in nodes for child in _not_run(node)}
    place = str(path.relative_to(ROOT))
    return [
        Mutant(place, number, variant, getattr(node, "lineno", 0), what)
        for number, node in enumerate(nodes)
        if id(node) not in skipped
        for variant in range(2)
        if (what := _change(copy.deepcopy(node), variant))
    ]


def _not_run(node: ast.AST) -> Iterator[ast.AST]:
    """What is below annotations, docstrings and the line that starts a script."""
    roots: list[ast.AST | None] = [
        getattr(node, "annotation", None),
        getattr(node, "returns", None),
    ]
    if isinstance(node, ast.keyword) and node.arg == "strict":
        roots.append(node.value)  # of zip: an assertion, which nothing can notice
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        roots.append(node)
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        roots.append(node)
    for root in filter(None, roots):
        yield from ast.walk(root)


def _change(node: Any, variant: int) -> str:
    """Change ``node`` in place; returns what was done, nothing if there is no such variant."""
    before = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
    if isinstance(node, ast.Compare) and not variant and type(node.ops[0]) in COMPARISONS:
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign) and not variant and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.AugAssign | ast.Expr) and (variant or isinstance(node, ast.Expr)):
        if variant != isinstance(node, ast.AugAssign):
            return ""
        _drop(node)
        return f"dropped: {before}"
    elif isinstance(node, ast.BoolOp) and not variant:
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.Constant) and not variant and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and not variant and isinstance(node.value, int | float):
        node.value = node.value + 1 if node.value < 1e6 else node.value * 2
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and not variant:
        before = ast.unparse(node.test)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return f"condition: not ({before})"
    else:
        return ""
    return f"{before} -> {ast.unparse(node)}"


def _drop(node: Any) -> None:
    """Turn a statement into ``pass``."""
    node.__class__, line = ast.Pass, node.lineno
    node.__dict__ = {"lineno": line, "col_offset": 0}


def measure(folder: Path, jobs: int) -> tuple[dict[str, dict[str, list[str]]], dict[str, float]]:
    """Run the quick tests once: which of them execute each line of each file, and how long each is.

    Args:
        folder: for the measurements of pytest-cov, which are taken again if they are there.
        jobs: test processes.
    """
    cached = folder / "tests.json"
    if not cached.exists():
        data = folder / ".coverage"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(data)}
        command = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", "-q", "--cov"]
        command += ["--cov-context=test", "--cov-report=", "-n", str(jobs), "-o", "addopts="]
        command += ["--durations=0", "--durations-min=0", "-vv"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the tests fail without any change:\n{failures(done)}")
        seconds: dict[str, float] = {}
        for line in done.stdout.splitlines():
            words = line.split(maxsplit=2)
            if len(words) == 3 and words[1] in ("call", "setup") and words[0].endswith("s"):
                seconds[words[2]] = seconds.get(words[2], 0.0) + float(words[0][:-1])
        import coverage

        read = coverage.CoverageData(str(data))
        read.read()
        reached = {
            os.path.relpath(file, ROOT): {
                str(line): sorted({c.rsplit("|", 1)[0] for c in contexts if "|" in c})
                for line, contexts in read.contexts_by_lineno(file).items()
            }
            for file in read.measured_files()
        }
        cached.write_text(json.dumps([reached, seconds]))
    reached, seconds = json.loads(cached.read_text())
    return reached, seconds


def failures(done: subprocess.CompletedProcess) -> str:
    """What the failing tests wrote, without the times of all others that follow it."""
    found = re.search(r"^=+ (FAILURES|ERRORS) .*?(?=^=+ slowest|\Z)", done.stdout, re.M | re.S)
    return found[0] if found else done.stdout[-3000:] + done.stderr[-3000:]


def tests_for(mutant: Mutant, reached: dict, seconds: dict[str, float]) -> list[str]:
    """The tests of the mutant's own file, then others that execute its line; the quickest first.

    A line that runs when its module is imported, such as a default, is reached by no test alone:
    for it, all tests that execute any line of the module. Those of its own file may reach it in a
    process that they start, which is not measured.
    """
    own = f"test_{Path(mutant.path).stem}.py"
    lines = reached.get(mutant.path, {})
    tests = set(lines.get(str(mutant.line)) or [test for line in lines.values() for test in line])
    tests |= {test for test in seconds if own in test.split("::")[0]}
    order = sorted(tests, key=lambda t: (own not in t.split("::")[0], seconds.get(t, 0.0), t))
    chosen, total = [], 0.0
    for test in order:
        total += seconds.get(test, 0.1)
        if chosen and total > SECONDS:
            break
        chosen.append(test)
    return chosen


def try_mutant(mutant: Mutant, tests: list[str], limit: float) -> str:
    """``killed``, ``survived``, or ``unreached`` if there is no test; a hang counts as killed."""
    if not tests:
        return "unreached"
    child = os.fork()
    if not child:
        _run_tests(mutant, tests)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"


def _run_tests(mutant: Mutant, tests: list[str]) -> None:
    """In a child: import the mutant in place of its file, and end with pytest's exit code."""
    code = 1
    try:
        os.setsid()
        with open(os.devnull, "w") as nothing:
            for stream in (1, 2):
                os.dup2(nothing.fileno(), stream)
        with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as changed:
            changed.write(mutant.source())
            changed.flush()
            os.environ["MUTANT"] = os.pathsep.join([str(ROOT / mutant.path), changed.name])
            os.environ["PYTHONPATH"] = str(HOOK)  # for processes that the tests start
            sys.path.insert(0, str(HOOK))
            import pytest
            import sitecustomize  # noqa: F401

            os.chdir(ROOT)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
            code = int(pytest.main([*tests, *options]))
    finally:
        os._exit(code)


def interval(killed: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson)."""
    z, share = 1.96, killed / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return (middle - half) / scale, (middle + half) / scale


def main() -> None:
    """Draw mutants of each room, try them, and print the scores and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="+", help="folders of modules")
    parser.add_argument("--count", type=int, default=200, help="mutants drawn in each room")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", default="mutants.json", help="results, rewritten after each room")
    parser.add_argument("--again", metavar="FILE", help="try only the survivors of these results")
    parser.add_argument("--work", default="demo/mutants", help="folder of measurements")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    work = ROOT / args.work
    work.mkdir(parents=True, exist_ok=True)
    reached, seconds = measure(work, args.jobs)
    # what every child would import again; none of it starts threads
    import cv2  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    before = {}
    if args.again:
        rows = json.loads(Path(args.again).read_text())
        before = {(r["path"], r["line"], r["what"]): r["result"] for r in rows}
    results: list[dict[str, Any]] = []
    for room in args.rooms:
        files = sorted((ROOT / room).glob("*.py"))
        everything = [mutant for path in files for mutant in mutants_of(path)]
        drawn = random.Random(args.seed).sample(everything, min(args.count, len(everything)))

        def judge(mutant: Mutant) -> dict[str, Any]:
            key = (mutant.path, mutant.line, mutant.what)
            result = before.get(key, "")
            if result != "killed":
                tests = tests_for(mutant, reached, seconds)
                limit = 30 + 4 * sum(seconds.get(test, 0.5) for test in tests)
                result = try_mutant(mutant, tests, limit)
            if result != "killed":
                print(f"  {mutant.path}:{mutant.line} {result}: {mutant.what[:110]}", flush=True)
            return dict(zip(("path", "line", "what"), key, strict=True)) | {"result": result}

        with ThreadPoolExecutor(args.jobs) as pool:
            own = list(pool.map(judge, drawn))
        results += own
        Path(args.out).write_text(json.dumps(results, indent=1))
        killed = sum(r["result"] == "killed" for r in own)
        low, high = interval(killed, len(own))
        print(
            f"{room}: {killed} of {len(own)} mutants noticed, {killed / len(own):.0%} "
            f"({low:.0%} to {high:.0%}), drawn of {len(everything)} by seed {args.seed}",
            flush=True,
        )


if __name__ == "__main__":
    main()
