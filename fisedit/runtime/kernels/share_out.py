"""How programs that have a part of a tile each share what is left to do when all parts are there."""

from __future__ import annotations

import triton
import triton.language as tl

MOST_PARTS = 15
"""Of a tile: each program has a bit of its lock."""
POLLS = 1000
"""How often a program looks for the parts of others, where all can run at the same time; about a millisecond."""


@triton.jit
def share_out(lock, number, parts, polls):
    """Of which programs the caller is to do the shares, a bit for each of the tile; its own part, the ``number``-th of
    ``parts``, lies in memory.

    Each does a share of its own as soon as all parts are there. It looks for them ``polls`` times; then it goes, and
    the last one to come does its share too. So none waits for long for one that may not be running.

    The lock counts in its low byte who has come, in the next one who is done with it, and has a bit for each that went.
    The last to be done leaves it as it was.
    """
    own = 1 << number
    state = tl.atomic_add(lock, 1, sem="acq_rel") + 1
    went, last = state >> 16, (state & 255) == parts
    while ((state & 255) < parts) & (polls > 0):
        state = tl.atomic_add(lock, 0, sem="acquire")
        polls -= 1
    goes = (state & 255) < parts
    state = tl.atomic_add(lock, tl.where(goes, 256 + (own << 16), 256), sem="acq_rel")
    if ((state >> 8) & 255) == parts - 1:
        tl.store(lock, 0)
    here = (state & 255) == parts  # also for one that was about to go
    return tl.where(last, own | went, tl.where(here, own, 0))
