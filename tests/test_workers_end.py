"""Data workers that ignore SIGTERM end with their process all the same."""

import subprocess
import sys

import pytest
from helpers import ROOT

PROGRAM = """
import builtins, sys
import multiprocessing
import torch
from torch.utils.data import DataLoader, TensorDataset
from utils.signals import shield_workers

def read():
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, num_workers=2, persistent_workers=True)
    shield_workers(loader)
    kept = iter(loader)  # still in use when Python ends
    next(kept)
    builtins.kept = kept

if sys.argv[1] == "child":
    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    sys.exit(process.exitcode)
read()
"""


@pytest.mark.parametrize("place", ["script", "child"])
def test_a_process_ends_while_its_workers_live(place):
    command = [sys.executable, "-c", PROGRAM, place]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
