"""How programs share tiles of work evenly, and how those that have a part of one each finish it together."""

from __future__ import annotations

import triton
import triton.language as tl

MOST_PARTS = 15
"""Of a tile: each program has a bit of its lock."""
MOST = tl.constexpr(MOST_PARTS)
POLLS = 1000
"""How often a program looks for the parts of others, where all can run at the same time; about a millisecond."""


@triton.jit
def divide(tiles, steps, programs):
    """How many steps each program takes, one after the other, and how many a tile counts.

    Where programs are three times as many as tiles, each has a part of one; else they go on to the next (Osama et al.,
    Stream-K, 2023). :func:`fisedit.runtime.tuning.product.busiest` says the same.
    """
    share, length = tl.cdiv(tiles * steps, programs), steps
    if 3 * tiles <= programs:
        share = tl.cdiv(steps, tl.minimum(programs // tiles, MOST))
        length = tl.cdiv(steps, share) * share
    return share, length


@triton.jit
def arrive(lock):
    """Say that a part of a tile lies in memory; for :func:`collect`."""
    return tl.atomic_add(lock, 1, sem="acq_rel") + 1


@triton.jit
def collect(lock, state, number, parts, polls):
    """Of which programs the caller is to do the shares, a bit for each of the tile; its own part is the ``number``-th
    of ``parts``, ``state`` what :func:`arrive` said.

    Each does a share of its own as soon as all parts are there. It looks for them ``polls`` times; then it goes, and
    the last one to come does its share too. So none waits for long for one that may not be running.

    The lock counts in its low byte who has come, in the next one who is done with it, and has a bit for each that went.
    The last to be done leaves it as it was.
    """
    own = 1 << number
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
