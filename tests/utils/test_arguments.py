"""What the scripts say of themselves."""

import importlib
import re

import pytest

from models.encoder import ENCODERS, RESNETS, create_encoder
from utils.arguments import parse_arguments

SCRIPTS = ["main_pretrain", "eval_knn", "eval_linear", "eval_retrieval", "eval_video_seg"]


@pytest.fixture(params=SCRIPTS)
def ask(request, monkeypatch, capsys):
    """Call a script with ``argv``; returns its name, the exit code, and what it printed."""
    module = importlib.import_module(request.param)

    def call(*argv, called=f"{request.param}.py"):
        monkeypatch.setattr("sys.argv", [f"/somewhere/{called}", *argv])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            module.main()
        return request.param, ended.value.code, capsys.readouterr()

    return call


def test_without_arguments_five_lines_say_what_to_do(ask):
    script, code, printed = ask()
    lines = printed.err.splitlines()
    assert code == 1 and not printed.out and len(lines) == 5
    assert lines[1].startswith(f"    python {script}.py --cfg synco_vit_small --data-path DATA ")
    assert "DATA " in lines[2] + lines[3] and lines[4] == "--help lists the flags."
    assert max(map(len, lines)) <= 100


def test_the_example_can_be_parsed(ask):
    script, _, printed = ask()
    (example,) = re.findall(r"    python \w+\.py (.*)", printed.err)
    add_arguments = importlib.import_module(script).add_arguments
    _, config = parse_arguments("", add_arguments, example.split())
    assert (config.MODEL.TYPE, config.MODEL.ENCODER) == ("synco", "vit_small")


def test_help_has_groups_defaults_and_an_example(ask):
    script, code, printed = ask("--help")
    text = " ".join(printed.out.split())
    titles = re.findall(r"^([a-z].*):$", printed.out, re.MULTILINE)
    assert code == 0 and titles == [
        "of this script alone",
        "what to run; a recipe may have other defaults",
        "batches and precision",
        "reading images",
    ]
    assert "images per process (default: 64)" in text
    assert "root of the run folders (default: output)" in text
    assert not re.search(r"default: (None|False|==SUPPRESS==|\[)", text)
    assert f"python {script}.py --cfg synco_vit_small --data-path DATA --output" in text
    own = {
        "main_pretrain": "--profile N",
        "eval_knn": "numbers of neighbours (default: 10 20 100 200, as far as there are images)",
        "eval_linear": "L2 strengths from 1e-6 to 1e5 that lbfgs tries (default: 45)",
        "eval_retrieval": "which of the two (default: roxford5k)",
        "eval_video_seg": "of a frame in pixels (default: 480)",
    }
    first, *shared = printed.out.split("what to run;")
    assert own[script] in " ".join(first.split()) and len(shared) == 1


def test_an_installed_command_is_called_by_its_name(ask):
    _, _, printed = ask(called="synco-xyz")
    assert printed.err.splitlines()[1].startswith("    synco-xyz --cfg ")


def test_the_encoders_are_listed(ask):
    _, code, printed = ask("--list-encoders")
    *names, more = printed.out.splitlines()
    assert code == 0 and names == [*ENCODERS, *RESNETS]
    assert re.fullmatch(r"timm/<name>: \d{3,} of timm, such as --list-encoders 'convnext\*'", more)


def test_encoders_of_a_pattern(ask):
    _, _, printed = ask("--list-encoders", "timm/resnet1?")
    assert printed.out.splitlines() == ["timm/resnet18"]
    create_encoder("timm/resnet18", 32)
    names = ask("--list-encoders", "*swin_t*")[2].out.splitlines()
    assert names[0] == "swin_tiny" and "timm/swin_tiny_patch4_window7_224" in names
