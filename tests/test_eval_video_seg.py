"""eval_video_seg.py: figures, files, several processes, and a user's mistakes."""

import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, figures, run_forked
from PIL import Image
from tqdm import tqdm

import eval_video_seg
from data.davis import palette, read_frame, read_mask, read_videos
from eval_video_seg import decide, one_hot
from evaluation.video_metrics import contour_accuracy, region_similarity, statistics
from tools.make_tiny_davis import UNUSUAL, write_davis
from utils.errors import UserError

# height and width such that a short side of 64 pixels keeps the ratio
SIZE = (64, 128)


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    write_davis(str(root), ["plain", *UNUSUAL], 6, *SIZE)
    return root


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One video of four frames."""
    root = tmp_path_factory.mktemp("short")
    write_davis(str(root), ["plain"], 4, *SIZE)
    return root


def arguments(root, output, *more, encoder="vit_nano"):
    return [
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", root, "--output", output),
        *("--short-side", "64", "--random-weights", *more),
        *("--opts", "MODEL.ENCODER", encoder, "MODEL.NAME", "run", "DATA.IMG_SIZE", "32"),
    ]


def folder(output):
    return output / "run" / "default" / "video_segmentation_davis2017"


@pytest.fixture(scope="module")
def evaluated(davis, tmp_path_factory):
    """The folder of one run over all kinds of video."""
    output = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", *map(str, arguments(davis, output, "--overlay"))])
        eval_video_seg.main()
    torch.distributed.destroy_process_group()
    return folder(output)


def test_results(evaluated):
    results = figures(evaluated / "results.json")
    metrics = [f"{metric}-{name}" for metric in "JF" for name in ("Mean", "Recall", "Decay")]
    assert list(results) == ["J&F-Mean", *metrics, "per_object", "protocol"]
    assert results["protocol"]["topk"] == 5
    entry = json.loads((evaluated / "results.json").read_text())["provenance"]
    assert entry["key"] == "random weights" and entry["data"]["images"]["frames"] > 0
    # in the order of the list; the first frame of `appear` has one object, `single` no score
    counts = {"plain": 2, "portrait": 2, "odd": 2, "late": 2, "vanish": 2, "appear": 1}
    names = [f"{name}_{n + 1}" for name, count in counts.items() for n in range(count)]
    assert list(results["per_object"]) == names
    for metric in ("J-Mean", "F-Mean"):
        mean = np.mean([scores[metric] for scores in results["per_object"].values()])
        assert results[metric] == pytest.approx(mean)
    assert results["J&F-Mean"] == pytest.approx((results["J-Mean"] + results["F-Mean"]) / 2)
    lines = [x.split() for x in (evaluated / "log_rank0.txt").read_text().splitlines()]
    table = lines.index(["Mean", "Recall", "Decay"])
    for line, metric in zip(lines[table + 1 :], "JF", strict=False):
        shown = [f"{results[f'{metric}-{name}']:.4f}" for name in ("Mean", "Recall", "Decay")]
        assert line == [metric, *shown]
    assert lines[table + 3] == ["J&F", f"{results['J&F-Mean']:.4f}"]
    with open(evaluated / "per_object.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["object"] for row in rows] == names
    assert list(rows[0]) == ["object", *metrics]
    for row in rows:
        assert float(row["J-Mean"]) == results["per_object"][row["object"]]["J-Mean"]


def test_the_masks_on_disk_give_the_scores(davis, evaluated):
    results = figures(evaluated / "results.json")
    for video in read_videos(str(davis)):
        shape = read_frame(video.frames[0]).shape[:2]
        files = sorted((evaluated / "masks" / video.name).iterdir())
        assert [file.stem for file in files] == [path[-9:-4] for path in video.frames]
        masks = [read_mask(str(file), shape) for file in files]
        truths = [read_mask(path, shape) for path in video.annotations]
        assert np.array_equal(masks[0], truths[0])
        with Image.open(files[-1]) as image:
            assert (image.mode, image.size) == ("P", shape[::-1])
            assert image.getpalette() == palette().flatten().tolist()
        for name, scores in results["per_object"].items():
            if name.rpartition("_")[0] != video.name:
                continue
            number = int(name.rpartition("_")[2])
            for metric, function in (("J", region_similarity), ("F", contour_accuracy)):
                values = [
                    function(truth == number, mask == number)
                    for truth, mask in zip(truths[1:-1], masks[1:-1], strict=True)
                ]
                assert scores[f"{metric}-Mean"] == pytest.approx(statistics(values)[0])


def test_a_random_encoder_follows_flat_coloured_objects(davis, evaluated):
    scores = json.loads((evaluated / "results.json").read_text())["per_object"]
    for name in ("plain", "portrait", "odd", "late"):
        video = next(video for video in read_videos(str(davis)) if video.name == name)
        shape = read_frame(video.frames[0]).shape[:2]
        first, *others = (read_mask(path, shape) for path in video.annotations)
        for number in (1, 2):
            # a mask that stays where it was
            still = np.mean([region_similarity(m == number, first == number) for m in others[:-1]])
            assert still < 0.25
            assert scores[f"{name}_{number}"]["J-Mean"] > 0.6


def test_numbers_of_objects_may_have_gaps(run_main, short, tmp_path):
    """The figures are those of the same objects numbered from 1."""
    shutil.copytree(short, tmp_path / "davis")
    for path in (tmp_path / "davis/Annotations/480p/plain").glob("*.png"):
        with Image.open(path) as image:
            mask, colours = np.array(image), image.getpalette()
        renamed = Image.fromarray(np.array([0, 3, 7], np.uint8)[mask])
        renamed.putpalette(colours)
        renamed.save(path)
    found = []
    for root, output in ((short, tmp_path / "a"), (tmp_path / "davis", tmp_path / "b")):
        run_main(eval_video_seg, *arguments(root, output))
        found.append(figures(folder(output) / "results.json"))
    one, other = (f.pop("per_object") for f in found)
    assert found[0] == found[1] and list(other) == ["plain_3", "plain_7"]
    assert list(one.values()) == list(other.values())


def test_an_object_that_vanished_is_gone(evaluated):
    last = np.array(Image.open(evaluated / "masks" / "vanish" / "00005.png"))
    assert (last == 1).sum() > 200
    assert (last == 2).sum() < 60


def test_overlays(davis, evaluated):
    for name, shape in (("plain", SIZE), ("odd", (61, 120)), ("single", SIZE)):
        masks = sorted((evaluated / "masks" / name).iterdir())
        overlays = sorted((evaluated / "overlay" / name).iterdir())
        assert [path.stem for path in overlays] == [path.stem for path in masks]
        assert cv2.imread(str(overlays[0])).shape == (*shape, 3)
    mask = np.array(Image.open(evaluated / "masks" / "plain" / "00000.png"))
    frame, drawn = (
        read_frame(str(path)).astype(int)
        for path in (
            davis / "JPEGImages/480p/plain/00000.jpg",
            evaluated / "overlay" / "plain" / "00000.jpg",
        )
    )
    change = np.abs(drawn - frame).max(2)
    assert change[mask > 0].mean() > 40
    assert change[mask == 0].mean() < 5


def test_each_frame_is_encoded_once(run_main, short, tmp_path, monkeypatch):
    calls, bars = [], []
    monkeypatch.setattr(eval_video_seg, "on_terminal", lambda: True)
    monkeypatch.setattr(eval_video_seg, "tqdm", lambda **o: bars.append(tqdm(**o)) or bars[0])
    encode = eval_video_seg.encode
    monkeypatch.setattr(eval_video_seg, "encode", lambda *a: (calls.append(1), encode(*a))[1])
    run_main(eval_video_seg, *arguments(short, tmp_path))
    assert len(calls) == bars[0].n == bars[0].total == 4
    assert not {"overlay", "pictures"} & {path.name for path in folder(tmp_path).iterdir()}


def test_films_and_curves_come_with_the_overlays_of_the_old_name(davis, evaluated):
    videos = read_videos(str(davis))
    films = {path.stem: path for path in (evaluated / "pictures").glob("*.gif")}
    assert set(films) == {video.name for video in videos}
    for video in videos:
        with Image.open(films[video.name]) as film:
            assert film.n_frames == len(video.frames)
            assert film.size == read_frame(video.frames[0]).shape[1::-1]
    assert (evaluated / "pictures" / "j_and_f.png").exists()


@pytest.mark.parametrize("shape", [(4, 6), (7, 5)])
def test_labels_of_the_grid_decide_the_pixels(shape):
    mask = np.zeros((shape[0] * 8, shape[1] * 8), dtype=np.uint8)
    mask[8:24, 8:16], mask[:8, 24:] = 1, 3
    labels = one_hot(mask, shape)
    assert labels.shape == (*shape, 4)
    assert torch.equal(labels.argmax(2), torch.from_numpy(mask[4::8, 4::8]).long())
    # at the size of the grid nothing is interpolated
    assert np.array_equal(decide(labels, shape, mask.shape), mask)


def test_weak_objects_win_on_their_own_scale():
    labels = torch.zeros(2, 2, 3)
    labels[..., 0] = torch.tensor([[0.9, 1.0], [1.0, 1.0]])
    labels[..., 1] = torch.tensor([[0.1, 0.0], [0.0, 0.0]])
    assert decide(labels, (2, 2), (2, 2)).tolist() == [[1, 0], [0, 0]]
    # the only object is everywhere, background nowhere
    labels = torch.zeros(2, 2, 2)
    labels[..., 1] = 1
    assert decide(labels, (2, 2), (2, 2)).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--topk", "0"), "--topk: invalid number"),
        (("--n-last-frames", "-1"), "--n-last-frames: invalid number"),
        (("--size-mask-neighborhood", "-1"), "neighborhood: invalid number"),
        (("--short-side", "32"), "--short-side must be a multiple of 16, at least 64"),
        (("--short-side", "100"), "--short-side must be a multiple of 16"),
        (("--data-path", "absent"), "absent: the data path does not exist"),
    ],
)
def test_mistakes(run_main, short, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run_main(eval_video_seg, *arguments(short, tmp_path, *more))


def test_settings_reach_the_propagation(run_main, short, tmp_path):
    scores = set()
    for number, flags in enumerate(
        (
            (),
            ("--n-last-frames", "0"),
            ("--size-mask-neighborhood", "1"),
            ("--size-mask-neighborhood", "0", "--topk", "100000"),
        )
    ):
        output = tmp_path / str(number)
        run_main(eval_video_seg, *arguments(short, output, *flags))
        scores.add(json.loads((folder(output) / "results.json").read_text())["J-Mean"])
    assert len(scores) == 4


def spoil_annotation(root):
    path = root / "Annotations/480p/plain/00003.png"
    Image.open(path).resize((60, 60)).save(path)


def spoil_frame(root):
    path = root / "JPEGImages/480p/plain/00002.jpg"
    path.write_bytes(path.read_bytes()[:400])


def resize_frame(root):
    path = root / "JPEGImages/480p/plain/00002.jpg"
    Image.open(path).resize((128, 128)).save(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_annotation, r"plain/00003\.png: the annotation has 60 x 60 pixels, its frame 128"),
        (spoil_frame, r"plain/00002\.jpg: not a readable image"),
        (resize_frame, r"plain/00002\.jpg: the frame has another size"),
    ],
)
def test_files_that_do_not_fit(run_main, short, tmp_path, spoil, message):
    root = shutil.copytree(short, tmp_path / "davis")
    spoil(root)
    with pytest.raises(UserError, match=message):
        run_main(eval_video_seg, *arguments(root, tmp_path))


def test_nothing_to_score(run_main, tmp_path):
    write_davis(str(tmp_path), ["single"], 1, *SIZE)
    with pytest.raises(UserError, match="nothing to score"):
        run_main(eval_video_seg, *arguments(tmp_path, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["vit_nano", "swin_tiny"])
def test_two_processes_give_the_figures_of_one(tmp_path, encoder):
    write_davis(str(tmp_path), ["plain", "portrait", "single"], 4, *SIZE)
    for processes in (0, 2):
        flags = arguments(tmp_path, tmp_path / str(processes), "--pictures", encoder=encoder)
        done = run_forked("eval_video_seg.py", *flags, processes=processes)
        assert done.returncode == 0, done.stdout
    one, two = (figures(folder(tmp_path / n) / "results.json") for n in "02")
    assert one == two
    drawn = [(folder(tmp_path / n) / "pictures/j_and_f.png").read_bytes() for n in "02"]
    assert drawn[0] == drawn[1]
    assert len(list((folder(tmp_path / "2") / "overlay/portrait").iterdir())) == 4
