"""The place of a run, and its clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loader import EpochBatches
from utils.errors import UserError
from utils.progress import EpochSize, Progress, clock, place_of


def test_the_place_in_the_epochs():
    progress = Progress(EpochSize(42, 8), 1, 7, 16)
    assert progress.size.updates == 5 and progress.steps_of_epoch == 2
    assert not progress.epoch_ended and progress.epochs == 1 + 16 / 42
    state = progress.state_dict()
    assert state == {
        **{"epoch": 1, "step": 7, "images": 16, "images_per_update": 8, "training_images": 42}
    }
    assert place_of(state, progress.size, "c.pth") == progress
    for _ in range(3):
        progress.advance()
    assert (progress.step, progress.images_seen) == (10, 40) and progress.epoch_ended
    assert progress.state_dict()["images"] == 42  # also those that fill no update
    assert progress.epochs == 2.0
    again = place_of(progress.state_dict(), progress.size, "c.pth")
    assert again.epoch_ended and (again.epoch, again.step, again.images_seen) == (1, 10, 42)
    again.next_epoch()
    assert again == Progress(EpochSize(42, 8), 2, 10, 0) and again.epochs == 2.0
    # v0.1 wrote at the end of an epoch alone
    old = place_of({"epoch": 3}, progress.size, "c.pth")
    assert old == Progress(EpochSize(42, 8), 3, 20, 42) and clock({"epoch": 3}) == 4.0


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_place_in_an_epoch_is_found(epoch):
    for images in range(25):
        for per_update in (1, 4, 5, 7, 24):
            size = EpochSize(24, per_update)
            place = place_of({"epoch": epoch, "images": images}, size, "c.pth")
            sampler = EpochBatches(24, per_update)
            sampler.start_at(place.epoch, place.images_seen)
            left = len(list(sampler))
            assert place.step + left == (place.epoch + 1) * size.updates
            assert (place.epoch, place.images_seen) == (epoch, images)
            assert place.epoch_ended == (left == 0) == (images > (size.updates - 1) * per_update)


@pytest.mark.parametrize("name", ["epoch", "step", "images", "training_images"])
@pytest.mark.parametrize("count", [-1, 1.5, "7", None])
def test_a_count_that_is_none_is_named(name, count):
    state = Progress(EpochSize(42, 8), 1, 7, 16).state_dict() | {name: count}
    with pytest.raises(UserError, match=f"c.pth: damaged, its {name} is "):
        place_of(state, EpochSize(42, 8), "c.pth")


sizes = st.tuples(st.integers(1, 200), st.integers(1, 200)).map(
    lambda pair: EpochSize(max(pair), min(pair))
)


@given(st.lists(st.tuples(sizes, st.integers(0, 12)), min_size=1, max_size=5))
def test_the_clock_never_goes_back(parts):
    """Whatever batch, accumulation, processes or data a run goes on with, at any place."""
    times, state = [], None
    for size, updates in parts:
        progress = place_of(state, size, "c.pth") if state else Progress(size)
        for _ in range(updates):
            if progress.epoch_ended:
                progress.next_epoch()
            before = progress.epochs
            progress.advance()
            assert progress.epochs > before
            times.append(progress.epochs)
        assert not state or clock(progress.state_dict()) >= clock(state)
        state = progress.state_dict()
        assert clock(state) == progress.epochs
        again = place_of(state, size, "c.pth")
        assert again.epochs == progress.epochs  # bit for bit: lines are dropped by it
    assert times == sorted(times)
