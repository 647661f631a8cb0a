"""The wheel: what it holds, and its commands outside of the checkout."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, SOURCES, TINY, write_images

import synco_vit.__main__
from synco_vit.__main__ import COMMANDS, tools

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN = [path for path in SOURCES if "synco_vit" not in path.parts]


def test_each_command_is_installed_and_has_a_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"synco-{name}": "synco_vit.__main__:main" for name in COMMANDS}
    for module in COMMANDS.values():
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage: python -m synco_vit {pretrain,knn,"),
        (("train",), "usage: python -m synco_vit {pretrain,knn,"),
        (("tools.absent",), "synco_vit: no such tool, tools.absent"),
        (("tools.feature_map",), "synco_vit: no such tool, tools.feature_map"),
        (("tools.hugging_face", "--help"), "synco_vit: no such tool, tools.hugging_face"),
        (("knn", "--absent"), "synco-knn: error: "),
    ],
)
def test_mistakes_end_in_one_line(words, said):
    command = [sys.executable, "-m", "synco_vit", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_lists_every_command_with_its_purpose(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["synco_vit", "--help"])
    synco_vit.__main__.main()
    first, *lines, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("usage: ")
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert listed.keys() == {*COMMANDS, *tools()} and all(listed.values())
    assert {"embed", "tools.benchmark", "tools.sort_val"} <= listed.keys()
    for module in tools().values():
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("name", tools())
def test_help_of_a_tool_has_defaults_and_an_example(monkeypatch, capsys, name):
    module = importlib.import_module(tools()[name])
    monkeypatch.setattr(sys, "argv", [f"{name.split('.')[1]}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m {name} " in said
    options = said[said.index("options:") :] if "options:" in said else said
    for line in re.split(r"\n  (?=-)", options)[1:]:
        assert len(line.split(maxsplit=2)) > 2 or "-h, --help" in line, f"{line} has no help"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("main_pretrain", True), ("eval_linear", True), ("eval_knn", False), ("eval_retrieval", False)]
    + [("eval_video_seg", False), ("tools.visualize", False), ("tools.export_backbone", False)],
)
def test_help_shows_what_a_command_uses(monkeypatch, capsys, name, shown):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    said = capsys.readouterr().out
    for flag in ("--accumulation-steps", "--use-checkpoint", "--throughput", "--resume"):
        assert (flag in said) == shown, flag
    assert "--batch-size" in said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the code with data sets beside it."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in [*SOURCES, *ROOT.glob("configs/**/*.yaml")]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    write_images(copy / "data/imagenet/train")
    (copy / "data/imagenet/reader.py").write_text("raise SystemExit\n")
    (copy / "data/labels.csv").write_text("a.jpg,0\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (built,) = copy.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_code_and_the_recipes_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {f"synco_vit/_code/{path.relative_to(ROOT)}" for path in OWN}
    code |= {f"synco_vit/_code/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/**/*.yaml")}
    own = {f"synco_vit/{name}.py" for name in ("__init__", "__main__", "own")}
    own.add("synco_vit/_code/pyproject.toml")
    assert names == code | own


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The ``bin`` of a fresh environment with the wheel, which borrows all else from this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


@pytest.mark.slow
def test_an_installed_project_trains_judges_and_exports(installed, imagenet, tmp_path):
    """In the user's own folder, which has modules of the project's names."""
    for name in ("utils", "models", "data", "main_pretrain"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    shutil.copytree(imagenet, tmp_path / "photos")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}

    def run(command, *arguments) -> str:
        done = subprocess.run(
            [installed / command, *arguments],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert run("synco-check-data", "imagenet", "photos").splitlines()[-1].startswith("photos: ")
    recipe = ("--cfg", "synco_vit_tiny", "--output", "out", "--data-path", "photos")
    opts = ("--opts", *TINY, "MODEL.NAME", "run", "TRAIN.EPOCHS", "1")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    run("python", *launch, "-m", "synco_vit", "pretrain", *recipe, *opts)
    folder = tmp_path / "out/run/default"
    assert (folder / "checkpoint.pth").exists()
    run("synco-knn", *recipe, "--nb-knn", "5", *opts)
    results = (folder / "knn_imagenet/results.json").read_text()
    assert f'"version": "{version()}"' in results and '"command": "synco-knn ' in results
    run("synco-export", *recipe, "--format", "pth", "--out", "vit.pth", *opts)
    run("synco-report", folder)
    assert (tmp_path / "vit.pth").exists() and (folder / "report/index.html").exists()
    run("python", "-c", "import synco_vit, sys; assert 'torch' not in sys.modules")
    program = (
        "from synco_vit import load_encoder\n"
        f"encoder = load_encoder({str(folder)!r})\n"
        "import torch\n"
        "print(tuple(encoder(torch.zeros(1, 3, 32, 32)).shape))"
    )
    assert run("python", "-c", program).strip() == "(1, 128)"


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_one_version_everywhere():
    """Of the package, of the citation, and at the head of the changes."""
    assert f"\nversion: {version()}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"# Changes\n\n## {version()}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_only_the_thin_package_is_installed_under_a_name_of_its_own():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert {name.split(".")[0] for name in packages} == {"synco_vit"}
    folders = {Path(*name.split(".")[2:]) for name in packages if "._code" in name}
    assert folders == {path.relative_to(ROOT).parent for path in OWN}
