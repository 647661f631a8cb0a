"""--cfg names a file, or a shipped recipe."""

import shutil

import pytest
from helpers import ROOT

from utils.config import load_config
from utils.errors import UserError
from utils.recipes import SHIPPED, recipe_names


def test_all_recipes_have_a_name():
    assert recipe_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert {"demo", "moby_vit_tiny"} <= set(recipe_names())


@pytest.mark.parametrize("given", ["moby_vit_tiny", "moby_vit_tiny.yaml", "configs/{}.yaml"])
def test_a_shipped_recipe_is_found_from_anywhere(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moby_vit_tiny").mkdir()  # such as demo/, which the demo makes
    config = load_config(given.format("moby_vit_tiny"))
    assert config == load_config(str(SHIPPED / "moby_vit_tiny.yaml"))


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("SEED: 7\n")
    assert load_config("configs/demo.yaml").SEED == 7
    shutil.copy("configs/demo.yaml", "demo")
    assert load_config("demo").SEED == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("configs/synco_vit_smal.yaml", "no such configuration: did you mean synco_vit_small?"),
        ("moby_swin_tny", "no such configuration: did you mean moby_swin_tiny?"),
        ("mine/photo.yaml", "no such configuration: did you mean mine/photos.yaml?"),
        ("mine", "a folder, not a configuration: recipes are in "),
        ("absent/xyz.yaml", "no such configuration: recipes are in "),
        ("../configs/demo", "no such configuration: did you mean demo?"),
    ],
)
def test_the_nearest_is_named(tmp_path, monkeypatch, given, said):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photos.yaml").write_text("SEED: 7\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        load_config(given)
    assert str(raised.value).startswith(f"{given}: {said}")
