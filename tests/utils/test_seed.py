"""Random numbers: the draws of the noise."""

import numpy as np
import pytest
import scipy.stats
import torch

from utils.seed import PART, normal

CPU = torch.device("cpu")


def test_draws_are_normal_and_do_not_repeat():
    torch.manual_seed(0)
    values = normal((64, 8, 100), CPU)
    assert values.shape == (64, 8, 100) and values.dtype == torch.float32
    assert scipy.stats.kstest(values.numpy().ravel(), "norm").pvalue > 0.01
    assert len(np.unique(values.numpy().ravel()[::10])) > 5000


def test_draws_of_neighbours_and_of_the_next_call_are_independent():
    torch.manual_seed(0)
    values, following = (normal((400, 500), CPU).flatten() for _ in range(2))
    for other in (following, *(values.roll(lag) for lag in (1, 2, 3, 256))):
        for power in (1, 2):  # also of their sizes
            correlation = np.corrcoef(values.pow(power).numpy(), other.pow(power).numpy())[0, 1]
            assert abs(correlation) < 5 / len(values) ** 0.5
    assert values.abs().max() > 4  # 6 draws in 100 000 are


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 0, 5), (2, 5, 7)])
def test_any_shape(shape):
    values = normal(shape, CPU)
    assert values.shape == shape and values.isfinite().all()


def test_draws_follow_from_torchs_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(normal((32, 6, 64), CPU))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(normal((32, 6, 64), CPU))


def test_the_number_of_threads_changes_nothing(monkeypatch):
    draws = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(5)
        draws.append(normal((3, PART, 2), CPU))
        product = torch.randn(300, 300) @ torch.ones(300)  # threads of OpenMP come back
        assert product.isfinite().all()
    assert draws[0].equal(draws[1]) and draws[0].equal(draws[2])
    values = draws[0].flatten()
    assert len(values[:PART].unique()) > 0.9 * PART
    for part in values.split(PART)[1:]:
        assert abs(np.corrcoef(values[:PART].numpy(), part.numpy())[0, 1]) < 5 / PART**0.5
