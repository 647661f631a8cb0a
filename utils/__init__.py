"""Start-up, configuration, checkpoints and process groups. Imports neither models nor data."""

import os

# torch reads it at its first allocation: large pages for large tensors, so fewer page faults
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
