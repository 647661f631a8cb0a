"""What the documentation says about the code."""

import re

import pytest
from helpers import ROOT

import eval_knn
import eval_linear
import eval_retrieval
import eval_video_seg
import main_pretrain
from data.transfer import markdown_table
from utils.arguments import parse_arguments
from utils.config import KEYS

SCRIPTS = (main_pretrain, eval_knn, eval_linear, eval_retrieval, eval_video_seg)
README = (ROOT / "README.md").read_text()


def test_the_table_of_data_sets_is_the_codes():
    assert markdown_table().strip() in (ROOT / "docs/data.md").read_text()


def test_the_readme_can_be_read_in_one_go():
    assert len(README.split()) <= 900


def test_every_recipe_and_script_that_the_readme_names_exists():
    named = [word.strip("`,.;:()") for line in README.splitlines() for word in line.split()]
    paths = {w for w in named if w.endswith((".py", ".yaml", ".md")) and "{" not in w}
    assert len(paths) > 8
    assert [p for p in sorted(paths) if not (ROOT / p).exists() and "](" not in p] == []


def test_jobs_and_settings_of_the_documents_exist():
    text = README + (ROOT / "docs/cluster.md").read_text()
    jobs = set(re.findall(r"jobs/\w+\.\w+", text))
    assert len(jobs) == 3 and all((ROOT / job).exists() for job in jobs)
    scripts = "".join(path.read_text() for path in (ROOT / "jobs").iterdir())
    lists = re.findall(r"(?:-v '?|--export=ALL,)([^\s']+)", text)
    names = {item.split("=")[0] for given in lists for item in given.split(",")}
    assert names >= {"TAG", "DATA", "LOCAL_DISK"}
    assert [name for name in names | {"MARGIN"} if f': "${{{name}:=' not in scripts] == []


def test_keys_that_the_documents_name_exist():
    """Or are said to be another's."""
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    known = {*KEYS, *(key.rpartition(".")[0] for key in KEYS)}
    others = {"MODEL.MOBY", "MODEL.SWIN", "MODEL.WEIGHTS"}  # of MoBY and of Detectron2
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(
            rf"\b(?:{'|'.join(sections)})\.[A-Z][A-Z0-9_.]*[A-Z0-9_]", path.read_text()
        )
        unknown = {key for key in named if key not in known} - others
        assert not unknown, f"{path.name}: {unknown}"


def test_flags_that_differences_names_exist(capsys):
    """Of some script, but the one that is said to be missing."""
    flags = set()
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            parse_arguments("", script.add_arguments, ["--help"])
        flags |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    named = re.findall(r"`(--[a-z][a-z0-9_-]+)", (ROOT / "docs/differences.md").read_text())
    elsewhere = {"--patch-size-override", "--local_rank", "--format"}
    assert len(set(named)) > 10 and set(named) - flags - elsewhere == set()
