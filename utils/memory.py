"""What the C library does with memory that tensors no longer need."""

import ctypes

# parameters of mallopt in <malloc.h> of the GNU C library
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30  # bytes


def keep_freed_memory() -> None:
    """Let later tensors on the CPU use freed memory again; without the GNU C library, do nothing.

    By default memory of over 32 MB goes back to the system and comes again page by page, filled
    with zeros: a fifth of the time of a training step. A process then keeps as much as it needed
    at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
