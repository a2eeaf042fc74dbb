"""How programs share tiles: each step is one program's, and the model of tiles counts them as they are divided."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fisedit.runtime.kernels.share_out import MOST_PARTS, divide  # noqa: E402
from fisedit.runtime.tuning.product import share_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _divide(out, tiles, steps, programs):
    share, length = divide(tiles, steps, programs)
    tl.store(out, share)
    tl.store(out + 1, length)


@pytest.mark.parametrize(
    ("tiles", "steps", "programs"),
    [(1, 180, 132), (20, 90, 132), (43, 45, 132), (44, 45, 132), (66, 7, 132), (100, 5, 132), (131, 9, 132),
     (3, 2, 5), (1, 1, 1)],
)  # fmt: skip
def test_every_step_is_one_programs(tiles: int, steps: int, programs: int) -> None:
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    _divide[(1,)](out, tiles, steps, programs)
    share, length = out.tolist()
    walked = torch.zeros(tiles, steps, dtype=torch.int64)
    parts: dict[int, list[int]] = {}
    owned: list[dict[int, int]] = []
    for program in range(programs):
        begin, end = program * share, min(program * share + share, tiles * length)
        own = {}
        for tile in range(begin // length, -(-end // length)):
            first, last = max(begin - tile * length, 0), min(end - tile * length, steps)
            walked[tile, first:last] += 1
            assert last > first
            if last - first < steps:
                own[tile] = program
                parts.setdefault(tile, []).append(program)
        owned.append(own)
    assert (walked == 1).all()
    assert all(given == list(range(given[0], given[-1] + 1)) and len(given) <= MOST_PARTS for given in parts.values())
    assert share_of(tiles, steps, programs) == (share, max((len(own) for own in owned), default=0))
    for tile, given in parts.items():
        assert given[0] == tile * length // share and given[-1] == (tile * length + length - 1) // share
    slots = [program + tile for tile, given in parts.items() for program in given]  # where products leave them
    assert len(slots) == len(set(slots)) and all(slot < 2 * programs for slot in slots)
