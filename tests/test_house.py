"""Where things live: who imports whom, who writes on the configuration, and what an update runs."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SOURCES, write_images

# a room may import those of lower rank, and itself
RANKS = {"utils": 0, "models": 1, "data": 1, "evaluation": 2, "scripts": 3}
FILES = {"logger.py": "utils", "optimizer.py": "models", "lr_scheduler.py": "models"}


def room(name: str) -> str | None:
    """The room of a module, or None if it is not the project's."""
    first = name.split(".")[0]
    if first in RANKS:
        return first
    if first in ("synco_vit", "tools"):
        return "scripts"
    return FILES.get(f"{first}.py", "scripts") if (ROOT / f"{first}.py").exists() else None


def imports(tree: ast.Module) -> set[str]:
    """Every module that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(ast.parse(path.read_text())):
        other = room(name)
        if other and other != own:
            assert RANKS[other] < RANKS[own], f"{path.name} of {own} imports {name} of {other}"
        tool = name.split(".")[0] == "tools"
        assert not tool or path.parent != ROOT, f"{path.name}, a script, imports a tool"


def test_no_module_imports_itself_by_others():
    """Also within a room, and also by imports within functions."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES}
    direct = {n: imports(ast.parse(p.read_text())) & names.keys() for n, p in names.items()}
    for name in names:
        seen, pending = set(), set(direct[name])
        while pending:
            other = pending.pop()
            seen.add(other)
            pending |= direct[other] - seen
        assert name not in seen, f"{name} is in a circle of imports"


def test_the_rooms_are_seen():
    """That the test above would notice."""
    assert room("evaluation.knn") == "evaluation" and room("optimizer") == "models"
    assert room("tools.benchmark.knn") == room("main_pretrain") == "scripts"
    assert room("torch.nn") is None
    assert imports(ast.parse("def f():\n    from data import loader")) == {"data", "data.loader"}
    assert len(SOURCES) > 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_writes_on_the_configuration(path):
    """But who reads it."""
    if path.relative_to(ROOT).as_posix() in ("utils/config.py", "utils/arguments.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            base = target
            while isinstance(base, ast.Attribute | ast.Subscript):
                base = base.value
            written = base is not target and isinstance(base, ast.Name) and base.id == "config"
            assert not written, f"{path.name}:{target.lineno} writes on the configuration"


def test_an_update_fits_in_a_readers_head(imagenet, tmp_path):
    """Project files that one SynCo update executes while a data worker reads, and all imported."""
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import main_pretrain
from utils.update import Update
from utils.progress import Progress
from timm.scheduler.scheduler import Scheduler
root, seen, steps, real = {str(ROOT)!r} + os.sep, set(), [0], Scheduler.step_update
def own(file):
    return file.startswith(root) and ".venv" not in file and "<" not in file
def watch(frame, event, argument):
    if event == "call" and own(frame.f_code.co_filename):
        seen.add(os.path.relpath(frame.f_code.co_filename, root))
def step_update(self, *given, **named):
    steps[0] += 1
    if steps[0] == 5:
        sys.setprofile(None)
        own_modules = {{m.__file__ for m in list(sys.modules.values())
                       if getattr(m, "__file__", None) and own(m.__file__)}}
        print("EXECUTED", *sorted(seen))
        print("IMPORTED", *sorted(os.path.relpath(f, root) for f in own_modules))
        sys.stdout.flush()
        os._exit(0)
    done = real(self, *given, **named)
    if steps[0] == 4:
        sys.setprofile(watch)
    return done
Scheduler.step_update = step_update
sys.argv = ["main_pretrain.py", "--cfg", root + "configs/demo.yaml", "--data-path",
            {str(imagenet)!r}, "--output", {str(tmp_path)!r}, "--batch-size", "4", "--opts",
            "DATA.NUM_WORKERS", "1", "MODEL.WARMUP_EPOCHS", "0", "TRAIN.KNN_FREQ", "0",
            "PRINT_FREQ", "100", "TRAIN.SAVE_STEPS", "0", "DATA.IMG_SIZE", "32"]
main_pretrain.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert {"main_pretrain.py", "models/synco.py", "utils/update.py"} <= set(lines["EXECUTED"])
    assert len(lines["EXECUTED"]) <= 14, lines["EXECUTED"]
    assert len(lines["IMPORTED"]) <= 40, lines["IMPORTED"]
    assert "utils/profiling.py" not in lines["IMPORTED"]  # without --profile


def test_data_sets_beside_the_code_are_not_seen(tmp_path):
    """A folder of images in data/, with a program that comes with it and that Python refuses."""
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("data", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_own.py").write_text('"""Own."""\n')
    write_images(tmp_path / "data/imagenet/train")
    for folder in ("data/imagenet", "data/davis/JPEGImages"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "test_bad.py").write_text("def broken(:\n")
    (tmp_path / "data/imagenet.zip").write_bytes(b"zip")

    def run(*command):
        tools = {"ruff": str(Path(sys.executable).with_name("ruff"))}
        words = [tools.get(word, word) for word in command]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    run("git", "init", "-q")
    seen = run("git", "status", "--porcelain", "-uall").stdout
    assert "data/test_own.py" in seen
    assert "imagenet" not in seen and "davis" not in seen
    for command in (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        (sys.executable, "-m", "mypy"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    collected = run(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    assert "test_bad" not in collected.stdout + collected.stderr
    # without git, as in an archive of the code
    shutil.rmtree(tmp_path / ".git")
    assert run("ruff", "check", ".").returncode == 0
