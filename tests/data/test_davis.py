"""The files of DAVIS: lists, frames, masks with their palette, and what is wrong with them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from data.davis import draw_mask, fit_frame, palette, read_frame, read_mask, read_videos, write_mask
from tools.make_tiny_davis import UNUSUAL, write_davis
from utils.errors import UserError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    write_davis(str(root), ["plain", *UNUSUAL], 4, 36, 64)
    return root


@pytest.fixture
def davis(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "davis")


def test_the_palette_is_that_of_pascal_voc():
    # the first colours as its development kit lists them
    expected = [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128),
        (0, 128, 128), (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0),
        (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0),
        (0, 192, 0), (128, 192, 0), (0, 64, 128),
    ]  # fmt: skip
    assert list(map(tuple, palette()[:21].tolist())) == expected
    assert palette()[255].tolist() == [224, 224, 192]
    assert len({tuple(colour) for colour in palette().tolist()}) == 256


def test_a_written_mask_reads_back_with_palette_and_indices(tmp_path):
    mask = np.arange(6, dtype=np.uint8).repeat(5).reshape(5, 6) * 50
    path = str(tmp_path / "mask.png")
    write_mask(path, mask)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), mask)
        assert image.getpalette() == palette().flatten().tolist()
        assert np.array_equal(np.array(image.convert("RGB")), palette()[mask])
    assert np.array_equal(read_mask(path, (5, 6)), mask)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_few_colours(tmp_path, bits):
    mask = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    image = Image.fromarray(mask)
    image.putpalette(palette()[: 2**bits].tobytes())
    image.save(tmp_path / "mask.png", bits=bits)
    assert np.array_equal(read_mask(str(tmp_path / "mask.png"), (2, 2)), mask)


def test_void_is_background(tmp_path):
    write_mask(str(tmp_path / "mask.png"), np.array([[255, 2]], dtype=np.uint8))
    assert read_mask(str(tmp_path / "mask.png"), (1, 2)).tolist() == [[0, 2]]


def test_the_videos_of_the_list(davis):
    videos = {video.name: video for video in read_videos(str(davis))}
    assert list(videos) == ["plain", *UNUSUAL]
    assert len(videos["single"].frames) == 1
    late = videos["late"]
    assert [path[-9:] for path in late.frames] == [f"{37 + i:05}.jpg" for i in range(4)]
    assert [path[-9:-4] for path in late.annotations] == [path[-9:-4] for path in late.frames]
    shapes = {}
    for name, video in videos.items():
        for frame, annotation in zip(video.frames, video.annotations, strict=True):
            shapes[name] = read_frame(frame).shape[:2]
            read_mask(annotation, shapes[name])
    assert shapes == dict.fromkeys(videos, (36, 64)) | {"portrait": (64, 36), "odd": (33, 56)}


def test_objects_of_the_drawn_videos(davis):
    present = {
        video.name: [
            set(np.unique(read_mask(path, read_frame(video.frames[0]).shape[:2])).tolist())
            for path in video.annotations
        ]
        for video in read_videos(str(davis))
    }
    assert present["plain"] == [{0, 1, 2}] * 4
    assert present["vanish"] == [{0, 1, 2}] * 2 + [{0, 1}] * 2
    assert present["appear"] == [{0, 1}] * 2 + [{0, 1, 2}] * 2


@pytest.mark.parametrize(
    "shape, short_side, expected",
    [
        ((480, 854), 480, (480, 832)),
        ((480, 910), 480, (480, 896)),
        ((854, 480), 480, (832, 480)),
        ((1080, 1920), 480, (480, 832)),
        ((479, 853), 480, (480, 832)),
        ((100, 100), 480, (448, 480)),
        ((36, 64), 64, (64, 64)),
        ((72, 36), 64, (128, 64)),
    ],
)
def test_the_size_that_is_encoded(shape, short_side, expected):
    assert fit_frame(np.zeros((*shape, 3), np.uint8), short_side).shape == (*expected, 3)


def test_masks_drawn_over_a_frame():
    frame = np.full((9, 9, 3), 100, dtype=np.uint8)
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[2:7, 2:7] = 1
    drawn = draw_mask(frame, mask)
    assert np.array_equal(drawn[mask == 0], frame[mask == 0])
    assert drawn[4, 4].tolist() == [114, 50, 50]
    assert drawn[2, 4].tolist() == [128, 0, 0]


def break_list(root, text):
    (root / "ImageSets/2017/val.txt").write_text(text)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: break_list(root, ""), r"val\.txt: lists no video"),
        (lambda root: break_list(root, "plain\nplain\n"), r"val\.txt: names a video twice"),
        (lambda root: break_list(root, "../plain\n"), "not the name of a video"),
        (lambda root: break_list(root, "plain\n\0\n"), r"val\.txt:2: holds a NUL byte"),
        (lambda root: break_list(root, "absent\n"), "480p/absent: no such file or folder"),
        (lambda root: (root / "ImageSets/2017/val.txt").unlink(), r"val\.txt: cannot read"),
        (
            lambda root: (root / "Annotations/480p/late/00038.png").unlink(),
            r"late/00038\.png: the annotation of a frame is missing",
        ),
        (
            lambda root: [path.unlink() for path in (root / "JPEGImages/480p/odd").iterdir()],
            "480p/odd: holds no frames",
        ),
    ],
)
def test_a_tree_with_a_gap(davis, spoil, message):
    spoil(davis)
    with pytest.raises(UserError, match=message):
        read_videos(str(davis))


def renumber(folder, number, extension=None):
    """Name the files of a folder by ``number(i)``."""
    for i, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        i = 3 - i  # from the last, so that none is overwritten
        path.rename(folder / f"{number(i)}{extension or path.suffix}")


@pytest.mark.parametrize(
    "number", [lambda i: i + 8, lambda i: f"frame-{i + 98:02}", lambda i: f"{10**20 + i}_x"]
)
def test_frames_are_taken_by_number(davis, number):
    before = read_videos(str(davis))[0]
    pixels = [read_frame(path) for path in before.frames]
    renumber(davis / "JPEGImages/480p/plain", number)
    renumber(davis / "Annotations/480p/plain", number)
    video = read_videos(str(davis))[0]
    stems = [path.rsplit("/", 1)[1][:-4] for path in video.frames]
    assert stems == [str(number(i)) for i in range(4)]
    assert [path.rsplit("/", 1)[1][:-4] for path in video.annotations] == stems
    assert all(map(np.array_equal, map(read_frame, video.frames), pixels))


def test_a_mask_has_its_frames_number_not_its_name(davis):
    renumber(davis / "Annotations/480p/plain", str)
    assert read_videos(str(davis))[0].annotations[3].endswith("plain/3.png")


def test_two_files_of_one_number(davis):
    frames = davis / "JPEGImages/480p/plain"
    shutil.copy(frames / "00003.jpg", frames / "3.jpg")
    with pytest.raises(UserError, match=r"plain/3\.jpg: has the number of 00003\.jpg"):
        read_videos(str(davis))


def test_frames_in_png(davis):
    frames = davis / "JPEGImages/480p/plain"
    before = [read_frame(path) for path in read_videos(str(davis))[0].frames]
    for path in frames.iterdir():
        Image.open(path).save(path.with_suffix(".PNG"))
        path.unlink()
    after = [read_frame(path) for path in read_videos(str(davis))[0].frames]
    assert all(map(np.array_equal, after, before))


def test_what_is_no_frame_is_left_out_and_counted(davis, logged):
    before = read_videos(str(davis))
    for name in ("._00000.jpg", "Thumbs.db", "notes.txt"):
        (davis / "JPEGImages/480p/plain" / name).touch()
    (davis / "Annotations/480p/plain/._00000.png").touch()
    break_list(davis, "\ufeff" + "\r\n\r\n".join(video.name for video in before))
    assert read_videos(str(davis)) == before
    expected = f"{davis}: left out: 3 hidden, 1 without an image's extension"
    assert logged == [expected]


def test_a_frame_that_leads_nowhere_is_named(davis):
    path = davis / "JPEGImages/480p/plain/00002.jpg"
    path.unlink()
    path.symlink_to("absent.jpg")
    with pytest.raises(UserError, match=r"00002\.jpg: no such file or folder"):
        list(map(read_frame, read_videos(str(davis))[0].frames))


def test_the_archive_as_it_unpacks(davis, tmp_path):
    flat = read_videos(str(davis))
    shutil.move(davis, tmp_path / "unpacked/DAVIS")
    nested = read_videos(str(tmp_path / "unpacked"))
    assert [video.name for video in nested] == [video.name for video in flat]
    assert nested[0].frames[0].startswith(str(tmp_path / "unpacked/DAVIS/JPEGImages"))
    with pytest.raises(UserError, match=r"unpack DAVIS-2017-trainval-480p\.zip of https://davis"):
        read_videos(str(tmp_path))


def test_no_data_path():
    with pytest.raises(UserError, match="set --data-path"):
        read_videos("")


def test_a_mask_that_cannot_be_used(davis, tmp_path):
    path = davis / "Annotations/480p/plain/00000.png"
    with pytest.raises(UserError, match=r"00000\.png: the annotation has 64 x 36 pixels, its"):
        read_mask(str(path), (64, 36))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"00000\.png: cannot read the annotation"):
        read_mask(str(path), (36, 64))
    Image.new("RGB", (64, 36)).save(path)
    with pytest.raises(UserError, match=r"00000\.png: an annotation must be indexed"):
        read_mask(str(path), (36, 64))
    with pytest.raises(UserError, match="no such file"):
        read_mask(str(tmp_path / "absent.png"), (1, 1))
