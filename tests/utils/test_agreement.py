"""Processes that run something else than the first are found at the start."""

import shutil

import pytest
from helpers import ROOT, arguments, run_forked, spawn

from utils.config import configuration_facts, load_config
from utils.distributed import check_agreement, on_first_process, rank
from utils.errors import UserError
from utils.provenance import source_digest


def disagree(_, folder: str) -> None:
    for facts, message in (
        ({"images": 5}, None),
        ({"images": 5 + rank()}, "process 1 differs from process 0: images is 6, not 5: start"),
        ({f"key{rank()}": 1}, "process 1 differs from process 0: key"),
    ):
        if message is None:
            check_agreement(facts)
            continue
        with pytest.raises(UserError, match=message):
            check_agreement(facts)

    def fail():
        assert rank() == 0
        raise UserError("no space")

    assert on_first_process(lambda: rank() + 7) == 7
    with pytest.raises(UserError, match="no space"):
        on_first_process(fail)


@pytest.mark.slow
def test_every_process_is_told(tmp_path):
    spawn(disagree, 2, str(tmp_path))


def test_what_may_differ_between_machines():
    recipe = str(ROOT / "configs/demo.yaml")
    base = configuration_facts(load_config(recipe))
    local = load_config(recipe, ["DATA.DATA_PATH", "/elsewhere", "DATA.NUM_WORKERS", "3"])
    assert configuration_facts(local) == base
    assert configuration_facts(load_config(recipe, ["TRAIN.BASE_LR", "3"])) != base
    assert base["TRAIN.OPTIMIZER.NAME"] == "'adamw'"


def test_the_code_is_compared(monkeypatch, tmp_path):
    before = source_digest()
    assert before == source_digest()
    for name in ("models", "data", "evaluation", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr("utils.provenance.ROOT", tmp_path)
    assert before == source_digest()
    for name in ("main_pretrain.py", "models/moby.py"):
        with open(tmp_path / name, "a") as file:
            file.write("# another version\n")
        assert before != source_digest()
        before = source_digest()


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_the_process_that_differs_is_named(monkeypatch, odd):
    """With what it holds, and what the first holds; a fact that one of them lacks counts too."""
    facts = [{"the seed": 0, "the images": "ab"} for _ in range(4)]
    monkeypatch.setattr("utils.distributed.all_gather_objects", lambda own: facts)
    check_agreement(facts[0])
    facts[odd] = facts[odd] | {"the seed": 7}
    message = f"process {odd} differs from process 0: the seed is 7, not 0: start all processes"
    with pytest.raises(UserError, match=message):
        check_agreement(facts[0])
    del facts[odd]["the seed"]
    with pytest.raises(UserError, match=f"process {odd} .*: the seed is None, not 0"):
        check_agreement(facts[0])
    facts[odd] = facts[0] | {"the model": 1}
    with pytest.raises(UserError, match=f"process {odd} .*: the model is 1, not None"):
        check_agreement(facts[0])


@pytest.mark.slow
def test_another_data_set_on_one_machine_ends_in_one_line(imagenet, tmp_path):
    for number in (0, 1):
        shutil.copytree(imagenet, tmp_path / f"data{number}")
    (tmp_path / "data1/train/class0/3.jpg").unlink()
    script = tmp_path / "own_path.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"path = {str(tmp_path / 'data')!r} + os.environ['RANK']\n"
        "sys.argv[sys.argv.index('--data-path') + 1] = path\n"
        f"runpy.run_path({str(ROOT / 'main_pretrain.py')!r}, run_name='__main__')\n"
    )
    done = run_forked(script, *arguments("moby", imagenet, tmp_path / "out"), processes=2)
    assert done.returncode != 0
    assert "process 1 differs from process 0: the " in done.stdout
    assert "Traceback" not in done.stdout
