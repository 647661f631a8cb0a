"""Random numbers: the draws of the noise."""

import numpy as np
import pytest
import scipy.stats
import torch

from utils.seed import normal

CPU = torch.device("cpu")


def test_draws_are_normal_and_do_not_repeat():
    torch.manual_seed(0)
    values = normal((64, 8, 100), CPU)
    assert values.shape == (64, 8, 100) and values.dtype == torch.float32
    assert scipy.stats.kstest(values.numpy().ravel(), "norm").pvalue > 0.01
    assert len(np.unique(values.numpy().ravel()[::10])) > 5000
    # neither do the streams
    parts = values.flatten().chunk(8)
    assert all(abs(float((parts[0] * part).mean())) < 0.05 for part in parts[1:])


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 0, 5), (2, 5, 7)])
def test_shapes_that_streams_do_not_divide(shape):
    values = normal(shape, CPU)
    assert values.shape == shape and values.isfinite().all()


def test_draws_follow_from_torchs_seed_whatever_the_cores():
    threads = torch.get_num_threads()
    draws = []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            torch.manual_seed(5)
            draws.append(normal((32, 6, 64), CPU))
    finally:
        torch.set_num_threads(threads)
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(normal((32, 6, 64), CPU))
