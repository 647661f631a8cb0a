"""eval_retrieval.py: figures, files, several processes, and a user's mistakes."""

import json
import math
import shutil

import pytest
import torch
from helpers import ROOT, figures, run_forked
from PIL import Image
from torch import nn

import eval_retrieval
from data.retrieval import RetrievalImages, read_ground_truth
from eval_retrieval import FILES
from evaluation.retrieval_features import MultiScale, shrink
from models.encoder import create_encoder
from tools.make_tiny_retrieval import write_retrieval
from utils.errors import UserError


@pytest.fixture(scope="module")
def revisited(tmp_path_factory):
    root = tmp_path_factory.mktemp("revisited")
    write_retrieval(str(root), landmarks=4, size=64)
    return root


def arguments(root, output, *more, encoder="vit_nano", workers=0):
    return [
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", root, "--output", output),
        *("--imsize", "48", *more, "--opts", "MODEL.ENCODER", encoder, "MODEL.NAME", "run"),
        *("DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", workers),
    ]


def results(output):
    path = output / "run" / "default" / "retrieval_roxford5k" / "results.json"
    return figures(path)


def test_results(run_main, revisited, tmp_path):
    run_main(eval_retrieval, *arguments(revisited, tmp_path, "--random-weights"))
    found = results(tmp_path)
    assert list(found) == ["dataset", "mAP", "mP@k", "protocol"]
    assert found["protocol"] == {"imsize": 48, "multiscale": False, "crop_query": False}
    assert found["dataset"] == "roxford5k"
    assert list(found["mAP"]) == list(found["mP@k"]) == ["easy", "medium", "hard"]
    for difficulty, precision in found["mAP"].items():
        assert 0 < precision <= 100
        assert list(found["mP@k"][difficulty]) == ["1", "5", "10"]
    log = (tmp_path / "run/default/retrieval_roxford5k/log_rank0.txt").read_text()
    (easy,) = [line.split() for line in log.splitlines() if line.startswith("easy")]
    figures = [found["mAP"]["easy"], *found["mP@k"]["easy"].values()]
    assert easy == ["easy", *(f"{figure:.2f}" for figure in figures)]


def test_results_say_which_encoder_and_images_they_are_of(run_main, revisited, tmp_path):
    flags = ("--random-weights", "--dump-features", tmp_path / "f")
    run_main(eval_retrieval, *arguments(revisited, tmp_path, *flags))
    path = tmp_path / "run/default/retrieval_roxford5k/results.json"
    made = json.loads(path.read_text())["provenance"]
    assert made["key"] == "random weights" and len(made["weights"]) == 64
    assert made["data"]["images"] == {"database": 31, "queries": 4}
    run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path / "f"))
    read = json.loads(path.read_text())["provenance"]
    assert [read[n] for n in ("key", "weights", "data")] == [
        made[n] for n in ("key", "weights", "data")
    ]


def test_pictures_are_a_sheet_for_each_difficulty(run_main, revisited, tmp_path):
    """They need the images also where the features are read."""
    flags = ("--random-weights", "--dump-features", tmp_path / "f")
    run_main(eval_retrieval, *arguments(revisited, tmp_path, *flags))
    expected, folder = results(tmp_path), tmp_path / "run/default/retrieval_roxford5k"
    assert not (folder / "pictures").exists()
    flags = ("--load-features", tmp_path / "f", "--pictures")
    run_main(eval_retrieval, *arguments(revisited, tmp_path, *flags))
    sheets = {f"ranking_{difficulty}.png" for difficulty in ("easy", "medium", "hard")}
    assert {path.name for path in (folder / "pictures").iterdir()} == sheets
    with Image.open(folder / "pictures" / "ranking_hard.png") as sheet:
        assert sheet.width > 2 * sheet.height  # the query and ten images, four queries
    alone = tmp_path / "alone/roxford5k"
    alone.mkdir(parents=True)
    shutil.copy(revisited / "roxford5k/gnd_roxford5k.pkl", alone)
    run_main(eval_retrieval, *arguments(alone.parent, tmp_path, *flags))
    assert results(tmp_path) == expected
    assert "not all pictures could be drawn" in (folder / "log_rank0.txt").read_text()


def test_right_features_are_judged_right(run_main, revisited, tmp_path):
    """Features that say which landmark an image shows, and nothing else."""
    truth = read_ground_truth(str(revisited), "roxford5k")
    kinds = ["easy", "hard", "junk"]

    def feature(name):
        _, number, kind = name.split("_")
        shown = kind == "query" or kind[:-1] in kinds
        return torch.eye(5)[int(number) if shown else 4]

    for name, images in zip(FILES, (truth.database, truth.queries), strict=True):
        # their length must not matter
        torch.save(3 * torch.stack([feature(image) for image in images]), tmp_path / name)
    run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path))
    found = results(tmp_path)
    assert found["mAP"] == {"easy": 100, "medium": 100, "hard": 100}
    assert set(found["mP@k"]["hard"].values()) == {100}


def test_features_serve_again_without_checkpoint_and_images(
    run_main, revisited, tmp_path, monkeypatch
):
    flags = arguments(revisited, tmp_path, "--random-weights", "--dump-features", tmp_path / "f")
    run_main(eval_retrieval, *flags)
    first = results(tmp_path)
    features = [torch.load(tmp_path / "f" / name, weights_only=True) for name in FILES]
    assert [tuple(part.shape) for part in features] == [(31, 128), (4, 128)]
    torch.testing.assert_close(features[0].norm(dim=1), torch.ones(31))

    def absent(*_):
        raise AssertionError("no image may be read")

    monkeypatch.setattr(RetrievalImages, "__init__", absent)
    run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path / "f"))
    assert results(tmp_path) == first


def test_a_data_set_without_hard_images(run_main, tmp_path):
    write_retrieval(str(tmp_path), landmarks=2, size=64)
    run_main(eval_retrieval, *arguments(tmp_path, tmp_path, "--random-weights"))
    found = results(tmp_path)
    assert found["mAP"]["hard"] is None
    assert found["mP@k"]["hard"] == {"1": None, "5": None, "10": None}
    assert found["mAP"]["easy"] == found["mAP"]["medium"] > 0


def test_three_scales():
    sizes = []

    class Means(nn.Module):
        def forward(self, images):
            sizes.append(tuple(images.shape[2:]))
            return images.mean((2, 3))

    images = torch.rand(2, 3, 40, 60)
    output = MultiScale(Means())(images)
    assert sizes == [(40, 60), (28, 42), (20, 30)]
    expected = images.mean((2, 3))
    for scale in (1 / math.sqrt(2), 0.5):
        expected += nn.functional.interpolate(images, scale_factor=scale, mode="bilinear").mean(
            (2, 3)
        )
    torch.testing.assert_close(output, expected / 3)


@pytest.mark.parametrize(
    ("encoder", "sides"),
    [("vit_nano", (1, 1)), ("vit_nano", (1, 48)), ("vit_nano", (2, 3)), ("swin_tiny", (48, 1))],
)
def test_a_tiny_image_has_features_at_every_scale(encoder, sides):
    model = MultiScale(create_encoder(encoder).eval())
    with torch.inference_mode():
        assert model(torch.rand(1, 3, *sides)).isfinite().all()


def test_sides_are_rounded_down_to_no_less_than_one():
    sizes = {side: shrink(torch.zeros(1, 3, side, 9), 0.5).shape[2:] for side in (1, 2, 3, 5)}
    assert sizes == {1: (1, 4), 2: (1, 4), 3: (1, 4), 5: (2, 4)}


@pytest.mark.parametrize("flag", ["--multiscale", "--crop-query"])
def test_flags_change_the_features(run_main, revisited, tmp_path, flag):
    parts = {}
    for folder, more in (("plain", ()), ("other", (flag,))):
        dump = tmp_path / folder
        flags = ("--random-weights", "--dump-features", dump, *more)
        run_main(eval_retrieval, *arguments(revisited, tmp_path, *flags))
        parts[folder] = [torch.load(dump / name, weights_only=True) for name in FILES]
    (database, queries), (database2, queries2) = parts["plain"], parts["other"]
    assert not torch.allclose(queries, queries2, atol=1e-4)
    assert torch.equal(database, database2) == (flag == "--crop-query")


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((30, 8), (4, 8)), r"database features \(30, 8\) and labels \(31,\): need one row"),
        (((31, 8), (4, 8, 1)), r"query features \(4, 8, 1\) and labels \(4,\)"),
        (((31, 8), (4, 7)), "features have 8 values, query features 7"),
    ],
)
def test_features_of_other_images(run_main, revisited, tmp_path, shapes, message):
    for name, shape in zip(FILES, shapes, strict=True):
        torch.save(torch.ones(shape), tmp_path / name)
    with pytest.raises(UserError, match=message):
        run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path))


def test_features_that_are_not_finite(run_main, revisited, tmp_path):
    database = torch.ones(31, 8)
    database[5, 3] = torch.nan
    for name, tensor in zip(FILES, (database, torch.ones(4, 8)), strict=True):
        torch.save(tensor, tmp_path / name)
    with pytest.raises(UserError, match="database features of image 5 are not finite"):
        run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path))


def test_features_of_another_kind(run_main, revisited, tmp_path):
    for name, tensor in zip(FILES, (torch.ones(31, 8), torch.ones(4, 8).long()), strict=True):
        torch.save(tensor, tmp_path / name)
    with pytest.raises(UserError, match=r"query_features\.pth: features must be dense real"):
        run_main(eval_retrieval, *arguments(revisited, tmp_path, "--load-features", tmp_path))


def test_mistakes(run_main, revisited, tmp_path):
    for more, message in (
        (("--imsize", "0"), "--imsize: invalid number"),
        (("--dataset", "oxford"), "invalid choice"),
        ((), r"checkpoint\.pth: no such file"),
        (("--load-features", tmp_path / "absent"), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(eval_retrieval, *arguments(revisited, tmp_path, *more))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["vit_nano", "swin_tiny"])
def test_two_processes_give_the_figures_of_one(revisited, tmp_path, encoder):
    for processes in (0, 2):
        output = tmp_path / str(processes)
        flags = arguments(revisited, output, "--random-weights", encoder=encoder, workers=1)
        done = run_forked("eval_retrieval.py", *flags, processes=processes)
        assert done.returncode == 0, done.stdout
    assert results(tmp_path / "0") == results(tmp_path / "2")


@pytest.mark.slow
def test_a_truncated_image_ends_in_one_line(tmp_path):
    root = write_retrieval(str(tmp_path), landmarks=2, size=64)
    path = f"{root}/jpg/landmark_00_junk1.jpg"
    with open(path, "r+b") as file:
        file.truncate(500)
    # read by a worker, whose traceback must not show
    flags = arguments(tmp_path, tmp_path, "--random-weights", workers=1)
    done = run_forked("eval_retrieval.py", *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert f"error: {path}: not a readable image" in done.stdout.splitlines()[-1]
