"""Memory that stays with the process between calls."""

from __future__ import annotations

import torch

__all__ = ["keep_freed_memory"]

# The most that glibc's threshold follows is 32 MiB.
_BLOCK = 31 * 2**20


def keep_freed_memory() -> None:
    """Let the process keep freed memory for its next request, which speeds up large batches on the CPU.

    The C library of Linux (glibc) returns a freed block to the system if it is larger than any that was freed
    before. A program that has freed no large block therefore gets the pages of its intermediate results anew
    in every call. This function allocates one block of 31 MiB, which is never written to, and frees it. From
    then on the process keeps up to 62 MiB of freed memory. Training does the same sooner or later, by freeing
    large tensors of its own.

    Forward and backward of 256 samples of 1024 arrays under ``Beta(0.6, 0.4)`` took 13.5 ms without it and
    7.9 ms with it, in a fresh process on one core; batches of 256 x 64 values and fewer took the same time.
    With other C libraries it changes nothing.

    Example:
        >>> keep_freed_memory()
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")
