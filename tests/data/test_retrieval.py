"""The files of revisited Oxford and Paris: ground truth, images, and what is wrong with them."""

import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from data.retrieval import DATASETS, RetrievalImages, crop_to_box, read_ground_truth
from tools.make_tiny_retrieval import write_retrieval
from utils.errors import UserError


@pytest.fixture
def revisited(tmp_path):
    write_retrieval(str(tmp_path), "rparis6k", 3, 64)
    return tmp_path


def change(root, edit):
    """Rewrite the ground truth as ``edit`` leaves it."""
    path = root / "rparis6k" / "gnd_rparis6k.pkl"
    truth = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(edit(truth) or truth))


def test_the_ground_truth(revisited):
    truth = read_ground_truth(str(revisited), "rparis6k")
    assert len(truth.database) == 5 + 8 + 8
    assert truth.queries == [f"landmark_{number:02}_query" for number in range(3)]
    # the cases that the drawn set should hold
    counts = [[len(labels[name]) for name in ("easy", "hard", "junk")] for labels in truth.labels]
    assert counts == [[0, 0, 2], [3, 0, 2], [3, 2, 0]]
    for labels in truth.labels:
        for name, indices in labels.items():
            assert all(name in truth.database[i] for i in indices)


def test_arrays_instead_of_lists(revisited):
    def edit(truth):
        truth["imlist"] = np.array(truth["imlist"])
        for entry in truth["gnd"]:
            entry.update({name: np.array(value) for name, value in entry.items()})

    before = read_ground_truth(str(revisited), "rparis6k")
    change(revisited, edit)
    after = read_ground_truth(str(revisited), "rparis6k")
    assert after.database == before.database
    assert after.boxes == before.boxes
    for left, right in zip(after.labels, before.labels, strict=True):
        assert all(np.array_equal(left[name], right[name]) for name in right)


def entry(**values):
    return lambda truth: truth["gnd"][1].update(values)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda truth: [truth], "not a ground truth"),
        (lambda truth: truth.pop("imlist") and None, "not a ground truth .*imlist"),
        (lambda truth: truth.update(qimlist=[]), "must hold names of images"),
        (lambda truth: truth.update(imlist=["../../x"]), "must hold names of images"),
        (lambda truth: truth["gnd"].pop() and None, "not a ground truth"),
        (lambda truth: truth["gnd"].append(0), "not a ground truth"),
        (lambda truth: truth.update(gnd=[1, 2, 3]), "query landmark_00_query"),
        (lambda truth: truth["gnd"][1].pop("easy") and None, "landmark_01_query: .*easy"),
        (entry(hard=[0.5]), "not an entry of revisitop"),
        (entry(hard=[[1]]), "not an entry of revisitop"),
        (entry(junk=[1, [2]]), "not an entry of revisitop"),
        (entry(easy=[21]), "names an image that is not among the 21"),
        (entry(easy=[-1]), "names an image that is not among the 21"),
        (entry(bbx=[1, 2, 3]), "not an entry of revisitop"),
        (entry(bbx=[5, 5, 5, 9]), "with an area"),
        (entry(bbx=[1, 2, float("nan"), 3]), "bbx must be"),
        (entry(bbx="box"), "not an entry of revisitop"),
    ],
)
def test_a_ground_truth_that_cannot_be(revisited, edit, message):
    change(revisited, edit)
    with pytest.raises(UserError, match=message) as caught:
        read_ground_truth(str(revisited), "rparis6k")
    assert "gnd_rparis6k.pkl" in str(caught.value)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_ground_truth_is_refused(revisited):
    victim = revisited / "victim"
    change(revisited, lambda truth: truth | {"more": Hostile(str(victim))})
    with pytest.raises(UserError, match="not a pickle of plain data"):
        read_ground_truth(str(revisited), "rparis6k")
    assert not victim.exists()


def test_images_shrink_to_their_longest_side(revisited):
    truth = read_ground_truth(str(revisited), "rparis6k")
    for index, name in enumerate(truth.database[:4]):
        with Image.open(truth.path(name)) as image:
            width, height = image.size
        small, number = RetrievalImages(truth, False, 32)[index]
        assert number == index
        assert max(small.shape[1:]) == 32
        assert small.shape[2] / small.shape[1] == pytest.approx(width / height, rel=0.05)
        same, _ = RetrievalImages(truth, False, 999)[index]
        assert same.shape == (3, height, width)


def test_queries_are_cropped_on_request_only(revisited):
    change(revisited, lambda truth: truth["gnd"][0].update(bbx=[4.4, 5.6, 20.0, 30.0]))
    truth = read_ground_truth(str(revisited), "rparis6k")
    whole, _ = RetrievalImages(truth, True, 999)[0]
    cropped, _ = RetrievalImages(truth, True, 999, crop=True)[0]
    assert np.array_equal(cropped, whole[:, 6:30, 4:20])
    # the database has no boxes
    assert RetrievalImages(truth, False, 999, crop=True)[0][0].shape[1:] != cropped.shape[1:]


def test_a_box_across_the_edge_and_one_beyond():
    image = Image.new("RGB", (20, 10))
    assert crop_to_box(image, (-3.0, 2.0, 25.0, 9.0), "a").size == (20, 7)
    with pytest.raises(UserError, match=r"a: the box of the query.*20 x 10"):
        crop_to_box(image, (20.0, 0.0, 30.0, 9.0), "a")


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((-9.0, -9.0, 99.0, 99.0), (20, 10)),
        ((-0.4, 0.0, 20.4, 10.4), (20, 10)),
        ((19.0, 9.0, 99.0, 99.0), (1, 1)),
        ((19.4, 9.4, 20.0, 10.0), (1, 1)),
        ((19.6, 0.0, 25.0, 10.0), None),
        ((-9.0, 0.0, 0.2, 10.0), None),
        ((0.0, -5.0, 20.0, -1.0), None),
        ((3.1, 3.1, 3.3, 3.3), None),
    ],
)
def test_crops_beyond_the_image(box, size):
    """What lies inside, or an error that names the image."""
    image = Image.new("RGB", (20, 10))
    if size:
        assert crop_to_box(image, box, "a").size == size
    else:
        with pytest.raises(UserError, match=r"a: the box of the query.*20 x 10"):
            crop_to_box(image, box, "a")


def test_images_in_the_folders_of_the_archives(revisited, logged):
    truth = read_ground_truth(str(revisited), "rparis6k")
    before = [RetrievalImages(truth, False, 32)[i][0] for i in range(len(truth.database))]
    jpg = revisited / "rparis6k/jpg"
    for number, path in enumerate(sorted(jpg.iterdir())):
        folder = jpg / "paris" / ("defense", "eiffel", "louvre")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
        (folder / f"._{path.name}").write_bytes(b"of macOS")
    count = len(list(jpg.rglob("._*")))
    truth = read_ground_truth(str(revisited), "rparis6k")
    images = RetrievalImages(truth, False, 32)
    assert all(images[i][0].equal(image) for i, image in enumerate(before))
    assert logged == [f"{jpg}: left out: {count} hidden"]


def test_one_image_in_two_folders(revisited):
    truth = read_ground_truth(str(revisited), "rparis6k")
    name = truth.database[0]
    path = truth.path(name)
    for folder in ("a", "b"):
        target = revisited / "rparis6k/jpg" / folder
        target.mkdir()
        shutil.copy(path, target)
    assert truth.path(name) == path
    os.remove(path)
    with pytest.raises(UserError, match=rf"jpg/a/{name}\.jpg: the image lies in .*jpg/b too"):
        truth.path(name)


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_is_missing_is_named_with_its_origin(tmp_path, dataset):
    write_retrieval(str(tmp_path), dataset, 2, 32)
    truth = read_ground_truth(str(tmp_path), dataset)
    os.remove(truth.path(truth.database[0]))
    with pytest.raises(UserError, match=r"it is missing.*unpack https://.*-v1\.tgz into jpg/"):
        truth.path(truth.database[0])
    shutil.rmtree(tmp_path / dataset / "jpg")
    with pytest.raises(UserError, match=r"/jpg: no such file or folder"):
        read_ground_truth(str(tmp_path), dataset).path("x")
    os.remove(tmp_path / dataset / f"gnd_{dataset}.pkl")
    with pytest.raises(UserError, match=rf"fetch it from http://.*revisitop.*/gnd_{dataset}\.pkl"):
        read_ground_truth(str(tmp_path), dataset)


def test_images_that_do_not_fit(revisited):
    truth = read_ground_truth(str(revisited), "rparis6k")
    path = truth.path(truth.queries[1])
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(UserError, match=r"landmark_01_query\.jpg: not a readable image"):
        RetrievalImages(truth, True, 32)[1]
    os.remove(path)
    with pytest.raises(UserError, match=r"landmark_01_query\.jpg: the ground truth names"):
        RetrievalImages(truth, True, 32)
    truth.queries[1] = truth.queries[0]
    truth.boxes[2] = None
    with pytest.raises(UserError, match="landmark_02_query has no bbx"):
        RetrievalImages(truth, True, 32, crop=True)


def test_no_data_path():
    with pytest.raises(UserError, match="set --data-path"):
        read_ground_truth("", "roxford5k")
