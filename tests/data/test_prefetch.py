"""Batches on their way to a GPU, with streams that only note what is asked of them."""

import contextlib

import pytest
import torch
from helpers import ROOT, TINY
from torch.utils.data import DataLoader, default_collate

from data.dataset import Views
from data.loader import build_pretraining_loader
from data.prefetch import FlatBatch, flatten, prefetch, unflatten
from utils.config import load_config


def samples(seed: int, draws: int = 0) -> list[Views]:
    """Two views of three images; their sizes are no multiples of what types align to."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(256, (3, 2, 5, 5, 3), generator=generator).byte()
    drawn = torch.rand(3, 2, draws, generator=generator)
    return [Views(*views[n], n - 1, n + 7, drawn[n]) for n in range(3)]


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the streams of a GPU were asked for, in order; copies stay on the host."""
    asked: list = []

    class Stream:
        def record_event(self):
            asked.append(f"copied {sum(x.startswith('copied') for x in asked)}")
            return asked[-1].replace("copied", "event")

        def wait_event(self, event):
            asked.append(f"wait for {event}")

    def to(tensor, device, non_blocking=False):
        assert device == "cuda" and non_blocking
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *given: asked.append("kept"))
    return asked


@pytest.mark.parametrize(
    "batch",
    [
        samples(0),
        samples(0, 5),
        [(torch.rand(3, 5, 5), number) for number in range(3)],
        [(torch.rand(3, 5, 5).half(), torch.rand(7).double()) for _ in range(3)],
        [(torch.rand(1, 1, 1).bool(), torch.tensor(True))],
    ],
)
def test_a_flat_batch_has_all_of_a_batch(batch):
    flat = flatten(batch)
    assert isinstance(flat, FlatBatch) and flat.memory.dtype == torch.uint8
    expected = default_collate(batch)
    found = unflatten(flat.memory.clone(), flat)
    assert isinstance(found, Views) == isinstance(batch[0], Views)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
        assert ours.is_contiguous()


def test_a_worker_stacks_into_memory_that_processes_share():
    loader = DataLoader(samples(0, 5), batch_size=3, num_workers=1, collate_fn=flatten)
    (flat,) = loader
    assert flat.memory.is_shared()
    expected = default_collate(samples(0, 5))
    for ours, theirs in zip(unflatten(flat.memory, flat), expected, strict=True):
        assert ours.equal(theirs)


def test_the_next_update_is_copied_before_one_is_made(asked):
    read = []

    def updates():
        for number in range(3):
            read.append(number)
            yield [flatten(samples(10 * number + m)) for m in range(2)]

    for number, micro_batches in enumerate(prefetch(updates())):
        assert read == list(range(min(3, number + 2)))  # one ahead, and not more
        assert asked[-3:] == [f"wait for event {number}", "kept", "kept"]
        for m, batch in enumerate(micro_batches):
            expected = default_collate(samples(10 * number + m))
            assert all(a.equal(b) for a, b in zip(batch, expected, strict=True))
    assert number == 2
    assert [x for x in asked if x != "kept"] == [
        *("copied 0", "copied 1", "wait for event 0", "copied 2", "wait for event 1"),
        "wait for event 2",
    ]
    assert list(prefetch([])) == []


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_resumed_epoch_goes_on_where_updates_were_made(imagenet, asked, monkeypatch, workers):
    """Batches that were fetched ahead of a stop come again."""
    opts = [*TINY, "DATA.NUM_WORKERS", workers, "TRAIN.ACCUMULATION_STEPS", "2"]
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    config.defrost()
    config.DATA.DATA_PATH = str(imagenet)
    plain = build_pretraining_loader(config)
    plain.start_at(1)
    expected = list(plain)
    assert len(expected) == 3 and not asked

    made = []
    for stop in (1, 3):
        with monkeypatch.context() as gpu:  # the loader's own pinning finds none
            gpu.setattr(torch.cuda, "is_available", lambda: True)
            loader = build_pretraining_loader(config)
        loader.start_at(1, len(made) * loader.size.images_per_update)
        for micro_batches in loader:
            made.append(micro_batches)
            if len(made) == stop:
                break
    assert sum(x.startswith("copied") for x in asked) == 2 + 2
    for ours, theirs in zip(made, expected, strict=True):
        for batch, same in zip(ours, theirs, strict=True):
            assert all(a.equal(b) for a, b in zip(batch, same, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_a_gpu():
    flat = [flatten(samples(number)) for number in range(20)]
    pinned = [[batch._replace(memory=batch.memory.pin_memory())] for batch in flat]
    for number, (batch,) in enumerate(prefetch(pinned)):
        assert all(part.is_cuda != (name == "replaced") for name, part in batch._asdict().items())
        expected = default_collate(samples(number))
        assert all(a.cpu().equal(b) for a, b in zip(batch, expected, strict=True))
