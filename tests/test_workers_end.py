"""Data workers that ignore SIGTERM end with their process all the same."""

import subprocess
import sys

from helpers import ROOT

PROGRAM = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from utils.signals import shield_workers

data = TensorDataset(torch.arange(8))
loader = DataLoader(data, num_workers=2, persistent_workers=True)
shield_workers(loader)
kept = iter(loader)  # still in use when Python ends
next(kept)
import builtins
builtins.kept = kept
"""


def test_a_process_ends_while_its_workers_live():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
