"""Sources, decoding, augmentation, sampling and loaders."""

import io
import itertools
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from data.augmentation import (
    MEAN,
    STD,
    Augmentation,
    apply_view,
    draw_box,
    draw_view,
    view_augmentations,
)
from data.dataset import CropAndFlip, RandAugmented, TestImages, TwoViews
from data.folders import FolderSource
from data.image import decode_rgb
from data.loader import EpochBatches, build_pretraining_loader, normalize, num_workers
from data.opening import DataPath, open_source, open_splits, open_train
from data.transfer import open_transfer_set
from data.zips import ZipSource
from tools.make_tiny_transfer import write_tiny
from utils.config import DEFAULTS, load_config
from utils.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GRADIENT = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
GREY = Image.fromarray(GRADIENT)
COLOUR = Image.fromarray(np.stack([GRADIENT, GRADIENT.T, 255 - GRADIENT], 2))
CLEAR = np.dstack([np.asarray(COLOUR), np.where(GRADIENT < 128, 0, 255).astype(np.uint8)])
ON_WHITE = np.where(GRADIENT[..., None] < 128, 255, np.asarray(COLOUR))


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encoded(COLOUR), COLOUR, 0),
        (encoded(COLOUR, "JPEG", quality=100, subsampling=0), COLOUR, 4),
        (encoded(COLOUR.convert("CMYK"), "TIFF"), COLOUR, 2),
        (encoded(GREY), GREY.convert("RGB"), 0),
        (encoded(GREY.convert("1")), GREY.convert("1").convert("RGB"), 0),
        (encoded(COLOUR.quantize(64)), COLOUR, 24),
        (encoded(Image.fromarray(CLEAR)), ON_WHITE, 0),
        (encoded(Image.fromarray(np.dstack([GRADIENT, CLEAR[..., 3]]), "LA")),
         np.where(GRADIENT < 128, 255, GRADIENT)[..., None].repeat(3, 2), 0),
        (encoded(Image.fromarray(GRADIENT.astype(np.uint16) * 257)), GREY.convert("RGB"), 0),
        (encoded(Image.fromarray(GRADIENT.astype(np.float32)), "TIFF"), GREY.convert("RGB"), 0),
        (encoded(Image.fromarray(GRADIENT / np.float32(255)), "TIFF"), GREY.convert("RGB"), 1),
    ],
)  # fmt: skip
def test_any_mode_becomes_rgb(content, expected, tolerance):
    image = decode_rgb(content, "x")
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("cut", [0, 20, 0.5])
def test_what_is_no_image_is_named(cut):
    content = encoded(COLOUR.resize((64, 64)), "JPEG")
    cut = int(cut * len(content)) if isinstance(cut, float) else cut
    with pytest.raises(UserError, match=r"photo\.jpg: not a readable image"):
        decode_rgb(content[:cut], "photo.jpg")


def make_zip(root, folder_root):
    for split in ("train", "val"):
        source = FolderSource(str(folder_root), split)
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            lines = []
            for path, label in zip(source.names, source.labels, strict=True):
                name = "/".join(path.split("/")[-2:])
                archive.write(path, name)
                lines.append(f"{name}\t{label}\n")
        (root / f"{split}_map.txt").write_text("".join(lines))


def test_folders_are_read_in_order_of_their_names(imagenet):
    source = FolderSource(str(imagenet), "val")
    assert source.classes == ["class0", "class1"]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert source.names[4].endswith("val/class1/0.jpg")


@pytest.mark.parametrize(("share", "kept"), [(None, 0), ((1, 2), 12), ((0, 1), 24)])
def test_zip_holds_what_the_folder_holds(imagenet, tmp_path, share, kept):
    make_zip(tmp_path, imagenet)
    zipped = open_source(str(tmp_path), "train", True)
    folder = open_source(str(imagenet), "train")
    assert zipped.labels.tolist() == folder.labels.tolist()
    if share:
        zipped.fill_cache(*share)
    assert len(zipped.cache) == kept
    for i in range(len(folder.names)):
        assert zipped.read_image(i).tobytes() == folder.read_image(i).tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class0/0.jpg 0\n", r"train_map\.txt:1: expected a path, a tab and a class number"),
        ("class0/0.jpg\tcat\n", r"train_map\.txt:1: expected"),
        ("class0/0.jpg\t0\nclass9/0.jpg\t0\n", r"class9/0\.jpg is not in .*train\.zip"),
        ("", "lists no images"),
    ],
)
def test_mistakes_in_a_zip_are_named(imagenet, tmp_path, text, message):
    make_zip(tmp_path, imagenet)
    (tmp_path / "train_map.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        ZipSource(str(tmp_path), "train")


def test_what_is_no_zip_is_named(imagenet, tmp_path):
    make_zip(tmp_path, imagenet)
    (tmp_path / "train.zip").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"train\.zip: cannot read \(File is not a zip"):
        ZipSource(str(tmp_path), "train")


@pytest.mark.parametrize("missing", ["root", "split", "images"])
def test_missing_data_is_named(tmp_path, missing):
    if missing == "root":
        root, message = tmp_path / "none", "none: the data path does not exist"
    elif missing == "split":
        root, message = tmp_path, "no folder train/ in the data path"
    else:
        (tmp_path / "train" / "cat").mkdir(parents=True)
        root, message = tmp_path, "train: no folder with images in it"
    with pytest.raises(UserError, match=message):
        FolderSource(str(root), "train")


PLAIN = {"crop": (1.0, 1.0), "jitter_prob": 0.0, "grey_prob": 0.0, "blur_prob": 0.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1))
def test_crops_lie_in_the_image(seed, width, height, smallest):
    rng = np.random.default_rng(seed)
    left, top, w, h = draw_box(rng, width, height, (smallest, 1.0))
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1
    assert left + w <= width and top + h <= height


def test_crops_are_distributed_as_torchvisions():
    rng, torchs = np.random.default_rng(0), []
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    own = np.array([draw_box(rng, 400, 300, (0.08, 1.0)) for _ in range(4000)])
    for _ in range(4000):
        top, left, h, w = transforms.RandomResizedCrop.get_params(
            image, (0.08, 1.0), (3 / 4, 4 / 3)
        )
        torchs.append((left, top, w, h))
    for column in range(4):
        for q in (0.1, 0.5, 0.9):
            one, other = np.quantile(own[:, column], q), np.quantile(np.array(torchs)[:, column], q)
            assert abs(one - other) <= 12, (column, q)


JITTER = {
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
}


def test_probabilities_of_the_views():
    first, second = view_augmentations("byol", 0.08)
    for augmentation, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        rng = np.random.default_rng(0)
        views = [draw_view(rng, 100, 100, augmentation) for _ in range(3000)]
        assert np.mean([v.sigma > 0 for v in views]) == pytest.approx(blur, abs=0.03)
        assert np.mean([v.solarize for v in views]) == pytest.approx(solarize, abs=0.03)
        assert np.mean([v.flip for v in views]) == pytest.approx(0.5, abs=0.03)
        assert np.mean([v.grey for v in views]) == pytest.approx(0.2, abs=0.03)
        assert np.mean([bool(v.jitter) for v in views]) == pytest.approx(0.8, abs=0.03)
        for name, (low, high) in JITTER.items():
            amounts = [dict(v.jitter)[name] for v in views if v.jitter]
            assert low <= min(amounts) < low + 0.02
            assert high - 0.02 < max(amounts) <= high
        assert len({tuple(n for n, _ in v.jitter) for v in views}) == 25  # all orders, and none
    simclr = view_augmentations("simclr", 0.08)
    assert simclr[0] == simclr[1]
    assert (simclr[0].crop, simclr[0].saturation, simclr[0].blur_prob) == ((0.2, 1.0), 0.4, 0.5)


class Scripted:
    """Draws what it is told: the first tries of the crop, then the numbers of ``draw_view``."""

    def __init__(self, crop: list[float], numbers: list[float]) -> None:
        self.crop, self.numbers = crop, numbers

    def random(self, shape):
        return np.array([self.crop] * 10 if shape == (10, 4) else self.numbers)


NUMBERS = ("flip", "jitter", "grey", "blur", "solarize", "sigma")


def scripted(order=(0.1, 0.2, 0.3, 0.4), amounts=(0.5,) * 4, augmentation=None, **numbers):
    first = [numbers.get(name, 0.99) for name in NUMBERS]
    rng = Scripted([0.5, 0.5, 0.0, 0.0], [*first, *order, *amounts])
    return draw_view(rng, 100, 100, augmentation or view_augmentations("byol", 0.08)[1])


@pytest.mark.parametrize(
    ("number", "probability", "field"),
    [
        ("flip", 0.5, "flip"),
        ("jitter", 0.8, "jitter"),
        ("grey", 0.2, "grey"),
        ("blur", 0.1, "sigma"),
        ("solarize", 0.2, "solarize"),
    ],
)
def test_what_happens_at_the_limit_of_a_probability(number, probability, field):
    """A draw of U(0, 1) below the probability does it, the probability itself does not."""
    assert getattr(scripted(**{number: probability - 1e-9}), field)
    assert not getattr(scripted(**{number: probability}), field)
    others = [f for f in ("flip", "jitter", "grey", "sigma", "solarize") if f != field]
    assert not any(getattr(scripted(**{number: 0.0}), other) for other in others)


def test_amounts_at_the_limits_of_their_ranges():
    low, high = (dict(scripted(jitter=0, amounts=(u,) * 4).jitter) for u in (0.0, 1.0))
    for name, (least, most) in JITTER.items():
        assert low[name] == pytest.approx(least) and high[name] == pytest.approx(most)
    one_each = dict(scripted(jitter=0, amounts=(0.0, 0.25, 0.5, 1.0)).jitter)
    expected = {"brightness": 0.6, "contrast": 0.8, "saturation": 1.0, "hue": 0.1}
    assert one_each == pytest.approx(expected)
    assert scripted(blur=0, sigma=0.0).sigma == pytest.approx(0.1)
    assert scripted(blur=0, sigma=1.0).sigma == pytest.approx(2.0)


def test_jitter_comes_in_the_order_of_its_numbers():
    names = [name for name, _ in scripted(jitter=0, order=(0.4, 0.1, 0.3, 0.2)).jitter]
    assert names == ["contrast", "hue", "saturation", "brightness"]


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (300, 400, (0, 0, 300, 400)),  # the whole image has an allowed shape
        (400, 300, (0, 0, 400, 300)),
        (100, 1000, (0, 433, 100, 133)),  # too tall: the middle, 3 wide and 4 high
        (1000, 100, (433, 0, 133, 100)),
    ],
)
def test_a_crop_that_never_fits_is_the_largest_in_the_middle(width, height, box):
    """The tries ask for the whole area in a shape that the image does not have."""
    wide = 0.0 if width > height else 1.0
    assert draw_box(Scripted([1.0, wide, 0.5, 0.5], []), width, height, (0.08, 1.0)) == box


def test_a_crop_by_hand():
    """Half of the area, square, at the far end of its room, then at the near end."""
    square = 0.5  # of the logarithm of the ratio
    assert draw_box(Scripted([0.5, square, 0.999, 0.999], []), 100, 100, (0.0, 0.5)) == (
        *(50, 50),
        *(50, 50),
    )
    assert draw_box(Scripted([0.5, square, 0.0, 0.0], []), 100, 100, (0.0, 0.5)) == (0, 0, 50, 50)
    wide = draw_box(Scripted([1.0, 1.0, 0.0, 0.0], []), 200, 200, (0.0, 0.3))
    assert wide[2:] == (round((12000 * 4 / 3) ** 0.5), round((12000 * 3 / 4) ** 0.5))


@pytest.mark.parametrize(("kind", "crop"), [("mixed", 0.1), ("byol", 0.0), ("byol", 1.5)])
def test_unknown_augmentations_are_refused(kind, crop):
    with pytest.raises(ValueError, match="must"):
        view_augmentations(kind, crop)


def test_operations_equal_torchvisions():
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    plain = draw_view(rng, 80, 60, Augmentation(**PLAIN))
    crop = transforms.functional.resized_crop(
        image, plain.box[1], plain.box[0], plain.box[3], plain.box[2], [32, 32]
    )
    expected = transforms.functional.hflip(crop) if plain.flip else crop
    # PIL crops and resizes in one go, without the border that two steps lose
    assert np.abs(apply_view(image, plain, 32).astype(int) - np.asarray(expected)).max() <= 2


def test_views_depend_on_seed_epoch_image_and_view_alone(imagenet):
    source = FolderSource(str(imagenet), "train")

    def views(seed, epoch, index):
        augmentations = view_augmentations("byol", 0.08)
        return torch.stack(TwoViews(source, augmentations, 32, seed)[epoch, index][:2])

    base = views(0, 1, 2)
    assert base.equal(views(0, 1, 2)) and base.dtype == torch.uint8
    assert not base[0].equal(base[1])
    assert not base.equal(views(1, 1, 2))
    assert not base.equal(views(0, 2, 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(imagenet, workers, monkeypatch):
    monkeypatch.setattr("data.loader.processors", lambda: 4)
    loaded = []
    for number in (0, workers):
        opts = f"DATA.IMG_SIZE 32 DATA.BATCH_SIZE 5 DATA.NUM_WORKERS {number}".split()
        config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
        config.DATA.DATA_PATH = str(imagenet)
        loader = build_pretraining_loader(config)
        assert loader.num_workers == number
        epochs = []
        for epoch in (0, 1):
            loader.start_at(epoch)
            epochs += [torch.stack([b.first, b.second]) for (b,) in loader]
        loaded.append(torch.stack(epochs))
    assert loaded[0].shape == (8, 2, 5, 32, 32, 3)
    assert loaded[0].equal(loaded[1])
    assert not loaded[0][:4].equal(loaded[0][4:])


@settings(max_examples=50, deadline=None)
@given(
    images=st.integers(1, 200),
    batch=st.integers(1, 12),
    world=st.integers(1, 4),
    multiple=st.integers(1, 3),
    first=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one(images, batch, world, multiple, first, epoch):
    if images < batch * world * multiple:
        with pytest.raises(ValueError, match="only"):
            EpochBatches(images, batch, 0, world, multiple=multiple)
        return
    alone = EpochBatches(images, batch * world, multiple=multiple)
    alone.start_at(epoch)
    parts = [EpochBatches(images, batch, r, world, multiple=multiple) for r in range(world)]
    for part in parts:
        part.start_at(epoch, first * batch * world * multiple)
    everything = list(alone)
    assert len(everything) % multiple == 0
    joined = [list(itertools.chain(*b)) for b in zip(*parts, strict=True)]
    assert joined == everything[first * multiple :]
    seen = [index for b in everything for _, index in b]
    assert len(set(seen)) == len(seen) and all(e == epoch for b in everything for e, _ in b)


def test_epochs_are_shuffled_differently():
    sampler = EpochBatches(50, 10)
    orders = []
    for epoch in (0, 1, 0):
        sampler.start_at(epoch)
        orders.append([i for batch in sampler for _, i in batch])
    assert orders[0] == orders[2] != orders[1]


def test_normalisation_is_imagenets():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = transforms.Normalize(MEAN, STD)(images.float() / 255)
    torch.testing.assert_close(normalize(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", [True, False])
def test_test_images_are_cropped_in_the_middle(tmp_path, crop):
    write_images(tmp_path / "val", classes=1, images=1)
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3))
    path = tmp_path / "val" / "class0" / "0.jpg"
    Image.fromarray(ramp).save(path, quality=95)
    image, label = TestImages(FolderSource(str(tmp_path), "val"), 32, crop=crop)[0]
    assert image.shape == (3, 32, 32) and label == 0
    # of 64 rows after the resize the middle 32 remain, or all 200 became 32
    top = 200 * 16 / 64 if crop else 0
    assert abs(float(image[:, 0].float().mean()) - top) < 6


@pytest.mark.parametrize("backend", ["opencv", "pil", "device"])
@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_pretraining_reads_images_of_arrays(tmp_path, process_group, name, backend):
    """As it reads the same images as files."""
    write_tiny(name, str(tmp_path / name))
    images = open_transfer_set(name, str(tmp_path / name), "train")
    for index, label in enumerate(images.labels):
        folder = tmp_path / "files/train" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        images.read_image(index).save(folder / f"{index:04}.png")
    order = np.argsort(images.labels, kind="stable")
    assert len(set(images.labels)) > 1

    def dataset(*opts):
        opts = [*TINY, "DATA.BACKEND", backend, "DATA.NUM_WORKERS", "0", *opts]
        config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
        return build_pretraining_loader(config).dataset

    arrays = dataset("DATA.DATASET", name, "DATA.DATA_PATH", str(tmp_path / name))
    files = dataset("DATA.DATA_PATH", str(tmp_path / "files"))
    assert len(arrays) == len(files) == len(order)
    files.source.names = [files.source.names[i] for i in np.argsort(order)]  # and their draws
    for index in range(len(order)):
        pairs = list(zip(arrays[0, index], files[0, index], strict=True))
        del pairs[3]  # the label: the folders of a few images are not all classes
        for one, other in pairs:
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize(("own", "asked", "workers"), [(4, 8, 4), (4, 3, 3), (1, 8, 1), (4, 0, 0)])
def test_data_workers_have_a_processor_each(monkeypatch, own, asked, workers):
    monkeypatch.setattr("data.loader.processors", lambda: own)
    config = DEFAULTS.clone()
    config.DATA.NUM_WORKERS = asked
    assert num_workers(config) == workers


def test_the_loader_of_training(imagenet, process_group, monkeypatch):
    """Prefetches and keeps its workers, which leave signals to their process."""
    monkeypatch.setattr("data.loader.processors", lambda: 4)
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), TINY)
    config.DATA.DATA_PATH = str(imagenet)
    config.DATA.NUM_WORKERS = 2
    loader = build_pretraining_loader(config)
    assert loader.num_workers == 2 and loader.persistent_workers and loader.prefetch_factor == 4
    assert len(loader) == 6 and (loader.size.images, loader.size.images_per_update) == (24, 4)
    assert loader.worker_init_fn.func.__name__ == "_start_shielded"
    assert loader.ahead == 8
    config.TRAIN.ACCUMULATION_STEPS = 3
    assert build_pretraining_loader(config).ahead == 3
    config.TRAIN.ACCUMULATION_STEPS = 1
    config.DATA.NUM_WORKERS = 0
    alone = build_pretraining_loader(config, "val")
    assert not alone.persistent_workers and alone.prefetch_factor is None and alone.ahead == 0
    assert (loader.dataset.replacements, alone.dataset.replacements) == (8, 0)


@pytest.mark.parametrize("accumulation", [0, 1, 3])
def test_the_micro_batches_of_an_update_come_together(imagenet, process_group, accumulation):
    opts = [*TINY, "TRAIN.ACCUMULATION_STEPS", str(accumulation), "DATA.NUM_WORKERS", "0"]
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    config.DATA.DATA_PATH = str(imagenet)
    loader = build_pretraining_loader(config)
    each = max(1, accumulation)
    updates = list(loader)
    assert len(loader) == len(updates) == 6 // each
    assert {len(micro_batches) for micro_batches in updates} == {each}
    first = torch.cat([batch[0] for update in updates for batch in update])
    loader.start_at(0, 4 * each)
    rest = torch.cat([batch[0] for update in loader for batch in update])
    assert rest.equal(first[4 * each :])


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_fine_tuning_takes_its_augmentations_from_the_configuration(jitter):
    aug = DEFAULTS.clone().AUG
    aug.AUTO_AUGMENT, aug.COLOR_JITTER, aug.REPROB = "none", jitter, 0.3
    steps = {
        type(step).__name__: step for step in RandAugmented(32, "bicubic", aug).transform.transforms
    }
    assert ("ColorJitter" in steps) == bool(jitter)
    assert "RandAugment" not in steps and steps["RandomErasing"].probability == 0.3
    aug.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    made = RandAugmented(32, "bicubic", aug).transform.transforms
    names = [type(step).__name__ for step in made]
    assert "RandAugment" in names and "ColorJitter" not in names
    image = RandAugmented(32, "bicubic", aug)(Image.new("RGB", (50, 40)), (0, 1, 2))
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32


def test_a_probe_crops_and_flips_alone():
    draws = CropAndFlip.DRAWS
    assert draws.crop == (0.08, 1.0)
    rest = (draws.jitter_prob, draws.grey_prob, draws.blur_prob, draws.solarize_prob)
    assert rest == (0, 0, 0, 0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    view = CropAndFlip(16)(image, (1, 2, 3))
    drawn = draw_view(np.random.default_rng((1, 2, 3)), 50, 40, draws)
    expected = torch.from_numpy(apply_view(image, drawn, 16)).permute(2, 0, 1)
    assert view.equal(expected) and view.is_contiguous()


@pytest.mark.parametrize("crop", [True, False])
def test_the_test_time_transform(tmp_path, crop):
    write_images(tmp_path / "val", classes=1, images=1)
    images = TestImages(FolderSource(str(tmp_path), "val"), 48, crop=crop)
    sizes = [step.size for step in images.transform.transforms]
    assert sizes == ([80, (48, 48)] if crop else [(48, 48)])
    assert images.transform.transforms[0].interpolation.value == "bicubic"
    assert len(images) == 1


@pytest.mark.parametrize(("given", "kept"), [("no", 0), ("part", 24), ("full", 24)])
def test_a_zip_is_cached_as_the_configuration_says(imagenet, tmp_path, process_group, given, kept):
    make_zip(tmp_path, imagenet)
    config = DEFAULTS.clone()
    config.DATA.update({"DATA_PATH": str(tmp_path), "ZIP_MODE": True, "CACHE_MODE": given})
    assert len(open_train(DataPath.of(config)).cache) == kept
    assert len(open_train(DataPath.of(config, "no")).cache) == 0
    train = open_train(DataPath.of(config))
    train, val = open_splits(DataPath.of(config, cache_mode="no"), train=train)
    assert len(train.cache) == kept and len(val.cache) == 0


def test_test_images_are_cropped_unless_told_otherwise(imagenet):
    source = FolderSource(str(imagenet), "val")
    assert len(TestImages(source, 32).transform.transforms) == 2


def test_an_augmentation_has_byols_ranges():
    """arXiv 2006.07733, table 6."""
    first = Augmentation((0.08, 1.0))
    assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (first.jitter_prob, first.grey_prob, first.blur_prob) == (0.8, 0.2, 1.0)
    assert first.solarize_prob == 0 and first.sigma == (0.1, 2.0)
    assert view_augmentations("byol", 0.08)[0] == first


def test_no_draw_of_randaugment_fails():
    """Among them are the rare ones at the ends of their ranges, such as a posterize of 0 bits."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    augment = RandAugmented(16, "bicubic", DEFAULTS.AUG)
    for number in range(1000):
        assert augment(image, (0, number)).shape == (3, 16, 16)
