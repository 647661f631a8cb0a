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


COLLECTION = """
import gc, os, re, sys
from pathlib import Path
import main_pretrain
from data.loader import build_pretraining_loader
from utils.config import load_config

options = ["DATA.DATA_PATH", sys.argv[1], "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "1"]
build_pretraining_loader(load_config("configs/moby_vit_tiny.yaml", options))

def own() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Private_Dirty: +([0-9]+)", text, re.M)[1]) / 1024

if not os.fork():  # as a data worker is
    before = own()
    gc.collect()
    print(own() - before, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_collection_in_a_worker_copies_nothing(imagenet):
    """It copied about 100 MB, of which it shared all before."""
    command = [sys.executable, "-c", COLLECTION, str(imagenet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10
