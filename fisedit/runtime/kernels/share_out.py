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

    The lock counts in its low byte who has come, and has a bit above for each that went. The last to come takes all
    that off again, which tells the others that it is there. It need not release what they wrote: all that changes the
    lock reads it, so that whoever sees the last change sees what came before each.
    """
    own = 1 << number
    goes = own << 8
    state = tl.atomic_add(lock, tl.where(polls > 0, 1, 1 + goes), sem="acq_rel") + 1
    shares = 0
    if (state & 255) == parts:
        tl.atomic_add(lock, -tl.where(polls > 0, state, state + goes), sem="relaxed")
        shares = own | (state >> 8)
    elif polls > 0:
        while ((state & 255) > 0) & ((state & 255) < parts) & (polls > 0):
            state = tl.atomic_add(lock, 0, sem="acquire")
            polls -= 1
        shares = own
        if ((state & 255) > 0) & ((state & 255) < parts):
            state = tl.atomic_add(lock, goes, sem="acq_rel")
            if ((state & 255) > 0) & ((state & 255) < parts):
                shares = 0
            else:  # all came just then
                tl.atomic_add(lock, -goes, sem="relaxed")
    return shares
