"""tools/soak.py: it sees growth, and samples a real run."""

import csv

import cv2
import numpy as np
import pytest
from helpers import run_script

from tools.soak import GROWTH, NAMES, report


def samples(growing: str = "") -> np.ndarray:
    columns = [np.arange(100.0), *(np.full(100, 50.0) for _ in NAMES[1:])]
    if growing:
        columns[NAMES.index(growing)] += np.linspace(0, 15, 100)
    return np.stack(columns, 1)


def test_a_flat_run_passes():
    assert report(samples())


@pytest.mark.parametrize("name", GROWTH)
def test_growth_is_noticed(name):
    assert not report(samples(name))


@pytest.mark.slow
def test_a_run_is_watched(tmp_path):
    done = run_script("tools/soak.py", tmp_path, "--minutes", 0.2, "--every", 0.5)
    assert "exit code 75 after SIGTERM" in done.stdout, done.stdout
    rows = list(csv.reader((tmp_path / "soak.csv").open()))
    assert tuple(rows[0]) == NAMES and len(rows) > 10
    assert max(int(row[-1]) for row in rows[1:]) > 1  # the data workers are sampled too
    picture = cv2.imread(str(tmp_path / "soak.png"))
    assert picture.shape == (720, 960, 3) and picture.std() > 5
