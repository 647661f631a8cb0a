"""``synco_vit.load_encoder``: names, files of each family, the transform, and other programs."""

import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from helpers import REFERENCE, ROOT, TINY, fresh
from PIL import Image
from safetensors.torch import save_file

from data.folders import FolderSource
from data.loader import build_test_images, normalize
from evaluation.encoder import build_transform
from models import build_method
from models.encoder import create_encoder
from synco_vit import load_encoder
from tools import embed, export_backbone
from utils.config import load_config

PHOTO = Image.effect_noise((50, 40), 60)


def write_checkpoint(folder, *opts):
    """A run folder with a checkpoint like those of pre-training, without a provenance."""
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [*TINY, *opts])
    method = build_method(config)
    folder.mkdir(parents=True)
    state = {"model": method.state_dict(), "config": config.dump()}
    torch.save(state, folder / "checkpoint.pth")
    return method


@torch.no_grad()
def assert_same(encoder, other, size=32):
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(encoder(images), other.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_nano", "resnet50", "timm/resnet18"])
def test_a_name_gives_random_weights(name):
    encoder = load_encoder(name, img_size=32)
    assert not encoder.training
    images = torch.randn(2, 3, 32, 32)
    features = encoder(images)
    assert features.shape == (2, encoder.num_features)
    assert encoder.forward_features(images).shape[:1] == (2,)
    assert encoder.transform(PHOTO).shape == (3, 32, 32)


@pytest.mark.parametrize("encoder", ["vit_nano", "timm/resnet18"])
def test_a_run_folder_says_which_encoder_it_has(tmp_path, encoder):
    method = write_checkpoint(tmp_path / "run", "MODEL.ENCODER", encoder)
    for key in ("encoder", "encoder_k"):
        loaded = load_encoder(tmp_path / "run", key=key)
        assert_same(loaded, getattr(method, key))
    assert loaded.transform(PHOTO).shape == (3, 32, 32)  # as it was trained
    assert load_encoder(tmp_path / "run", img_size=48).transform(PHOTO).shape == (3, 48, 48)


def test_the_transform_is_that_of_the_run(imagenet, tmp_path):
    opts = ["TEST.CROP", "False", "DATA.INTERPOLATION", "nearest"]
    write_checkpoint(tmp_path / "run", *opts)
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [*TINY, *opts])
    source = FolderSource(str(imagenet), "val")
    expected = normalize(build_test_images(config, source)[0][0][None])[0]
    with Image.open(imagenet / "val" / source.names[0]) as image:
        assert load_encoder(tmp_path / "run").transform(image).equal(expected)


def test_batch_norms_are_seen(tmp_path):
    method = write_checkpoint(tmp_path / "run", "MODEL.REPLACE_LN_WITH_BN", "True")
    assert_same(load_encoder(tmp_path / "run"), method.encoder)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_small_patch16_224", {"depth": 12}), ("swin_tiny_patch4_window7_224", {})],
)
def test_weights_alone_are_known_by_their_shapes(tmp_path, name, options):
    """As DINO's or Microsoft's; the six heads of DINO's ViT-S, which shapes do not tell."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, **options)
    weights = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"teacher": weights}, tmp_path / "dino.pth")
    assert_same(load_encoder(tmp_path / "dino.pth"), theirs, 224)


@pytest.mark.parametrize("kind", ["timm", "pth"])
def test_an_export_says_what_it_is(tmp_path, monkeypatch, kind):
    method = write_checkpoint(tmp_path / "run", "MODEL.ENCODER", "swin_tiny")
    out = tmp_path / f"e.{'safetensors' if kind == 'timm' else 'pth'}"
    words = ["--cfg", "synco_vit_tiny", "--pretrained", tmp_path / "run/checkpoint.pth"]
    words += ["--format", kind, "--out", out, "--opts", *TINY, "MODEL.ENCODER", "swin_tiny"]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export_backbone.main()
    loaded = load_encoder(out)
    assert_same(loaded, method.encoder)
    assert loaded.transform(PHOTO).shape == (3, 32, 32)


def test_what_no_file_tells_is_asked_for(tmp_path):
    theirs = timm.create_model("resnet18", num_classes=0)
    save_file(theirs.state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="nothing tells which encoder"):
        load_encoder(tmp_path / "resnet.safetensors")
    loaded = load_encoder(tmp_path / "resnet.safetensors", encoder="timm/resnet18", img_size=64)
    assert_same(loaded, theirs, 64)


def test_of_several_encoders_in_a_file_one_is_chosen(tmp_path):
    first, second = (create_encoder("vit_nano", img_size=32) for _ in range(2))
    torch.save({"a": first.state_dict(), "b": {"c": second.state_dict()}}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"several parts of it fit: a, b\.c"):
        load_encoder(tmp_path / "two.pth", encoder="vit_nano")
    for container, one in (("a", first), ("b.c", second)):
        loaded = load_encoder(tmp_path / "two.pth", encoder="vit_nano", container=container)
        assert_same(loaded, one)


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("absent.pth", {}, "absent.pth: no such file, and no encoder: vit_nano, "),
        ("timm/absent", {}, "timm has no such model"),
        ("vit_nano", {"key": "teacher"}, "key must be encoder or encoder_k"),
        ("vit_nano", {"img_size": -1}, "DATA.IMG_SIZE must be from "),
        (str(REFERENCE / "backbones.npz"), {}, "backbones.npz: "),
    ],
)
def test_mistakes_are_value_errors_of_a_line(source, options, said):
    with pytest.raises(ValueError, match=said) as error:
        load_encoder(source, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("crop", [True, False])
def test_the_transform_is_that_of_the_evaluations(imagenet, crop):
    config = load_config(str(ROOT / "configs/demo.yaml"), ["TEST.CROP", str(crop)])
    source = FolderSource(str(imagenet), "val")
    expected = normalize(build_test_images(config, source)[0][0][None])[0]
    transform = pickle.loads(pickle.dumps(build_transform(config)))  # as spawned workers get it
    with Image.open(imagenet / "val" / source.names[0]) as image:
        assert transform(image).equal(expected)
        grey = transform(image.convert("L"))
    assert grey.shape == expected.shape


def test_the_examples_of_the_page_run(run_main, imagenet, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    write_checkpoint(tmp_path / "OUT/synco/TAG")
    (tmp_path / "DATA").symlink_to(imagenet)
    shutil.copytree(imagenet / "val", tmp_path / "PHOTOS")
    first, *_, last = sorted(p for p in (tmp_path / "PHOTOS").glob("**/*") if p.is_file())
    shutil.copy(first, last.with_name("zzz.jpg"))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/python.md").read_text()
    command = re.search(r"^    synco-embed (.*)$", text, re.MULTILINE)
    run_main(embed, *command[1].split(), "--workers", 0)
    capsys.readouterr()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
    assert 0 <= float(capsys.readouterr().out.removeprefix("accuracy ")) <= 1
    assert len(scope["nearest"]) == 5 and scope["nearest"][0].endswith("zzz.jpg")
    assert any(str(first.name) in one and two.endswith("zzz.jpg") for one, two in scope["twins"])


def test_a_caller_with_modules_of_the_same_names(tmp_path):
    """Also where what is read only then is needed: the configuration of a published checkpoint."""
    for name in ("utils", "models", "data"):
        (tmp_path / f"{name}.py").write_text(f"owner = 'caller of {name}'")
    encoder, _ = fresh("vit_nano")
    node = load_config(str(ROOT / "configs/demo.yaml"), ["MODEL.ENCODER", "vit_nano"])
    torch.save({"model": encoder.state_dict(), "config": node}, tmp_path / "c.pth")
    code = (
        f"import sys, utils; sys.path.append({str(ROOT)!r}); path = list(sys.path)\n"
        "from synco_vit import load_encoder\n"
        "first, second = load_encoder('c.pth'), load_encoder('vit_nano')\n"
        "import models, data\n"
        "assert type(first) is type(second) and sys.path == path\n"
        "print(utils.owner, models.owner, data.owner)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "caller of utils caller of models caller of data\n"


def test_every_encoder_of_the_project_is_told_by_its_weights(tmp_path):
    for name in ("vit_tiny", "swin_small", "resnet50"):
        encoder = create_encoder(name)
        torch.save(encoder.state_dict(), tmp_path / "w.pth")
        assert type(load_encoder(tmp_path / "w.pth")) is type(encoder)


PICKLES = """
import copy, pickle, types
import torch
from torch.utils.data import DataLoader
from synco_vit import load_encoder


class Features(torch.utils.data.Dataset):
    def __init__(self, encoder):
        self.encoder = encoder

    def __len__(self):
        return 2

    def __getitem__(self, number):
        with torch.no_grad():
            return self.encoder(torch.ones(1, 3, 32, 32))[0]


if __name__ == "__main__":
    if CALLERS:
        import sys

        sys.modules |= {name: types.ModuleType(name) for name in ("models", "utils", "data")}
    for name in ("vit_nano", "timm/vit_tiny_patch16_224", "swin_tiny", "timm/resnet18"):
        encoder = load_encoder(name, img_size=32)
        wanted = Features(encoder)[0]
        for copied in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(copy.copy(encoder))):
            again = pickle.loads(pickle.dumps(copied))  # a copy does, too
            assert again is not encoder and type(again) is type(encoder)
            assert Features(again)[0].equal(wanted)
            copied.load_state_dict(encoder.state_dict())
    loader = DataLoader(Features(load_encoder("vit_nano", img_size=32)), 2, num_workers=1,
                        multiprocessing_context="spawn")
    assert next(iter(loader)).shape == (2, 128)
"""


@pytest.mark.parametrize("callers", [False, True])
def test_an_encoder_pickles_and_copies(tmp_path, callers):
    """By a caller with modules of the same names as well, and in a spawned worker of a loader."""
    (tmp_path / "script.py").write_text(PICKLES.replace("CALLERS", str(callers)))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
