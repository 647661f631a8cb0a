"""Freed memory is used again instead of fetched anew from the system."""

import subprocess
import sys

from helpers import ROOT

PAGE_FAULTS = """
import resource
import torch
from utils.run import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(20_000_000)  # 80 MB: 20 000 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
print(before, [faults() for _ in range(6)][-1])  # the first ones enlarge the heap
"""


def test_large_tensors_take_the_memory_of_freed_ones():
    command = [sys.executable, "-c", PAGE_FAULTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 50_000 and after < 1000
