"""Where the samples of a call find their recorded values: link by link of a chain of edits, by address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime.cache.block import Block, Kept
from fisedit.runtime.cache.store import Overlay, StackedCache, StepCache, Value

Source = StepCache | StackedCache
Link = tuple[StepCache, int] | None
"""One link of a sample's chain, and the sample's number in it; ``None`` where its chain is shorter than others'."""


def origins(source: Source, batch: int) -> list[tuple[StepCache, int]]:
    """For each sample of a call, the recorded call that it reads, and its number in that."""
    return list(source.origins) if isinstance(source, StackedCache) else [(source, n) for n in range(batch)]


def links(source: Source, batch: int) -> list[list[Link]]:
    """For each depth the links of all samples: the dense recordings first, then what edits put over them."""
    chains = [(cache.chain, sample) for cache, sample in origins(source, batch)]
    depths = range(max(len(chain) for chain, _ in chains))
    return [[(chain[d], sample) if d < len(chain) else None for chain, sample in chains] for d in depths]


def rows_at(link: Link, slot: str) -> Value | None:
    """What a link has of a slot: the whole value, or the rows of an overlay."""
    value = link[0].values.get(slot) if link is not None else None
    return value.rows if isinstance(value, Overlay) else value


def overlay_at(link: Link, slot: str) -> Overlay | None:
    value = link[0].values.get(slot) if link is not None else None
    return value if isinstance(value, Overlay) else None


def place(link: Link, slot: str) -> tuple[int, int]:
    """The addresses of a sample's rows, and of their scales; 0 for what is not there."""
    value = rows_at(link, slot)
    if value is None or link is None:
        return 0, 0
    if isinstance(value, Tensor):
        return value.data_ptr() + link[1] * value.stride(0) * value.element_size(), 0
    begins, scales = value.addresses()
    return begins[link[1]], scales[link[1]] if scales else 0


def newest(cache: StepCache, number: int, slot: str) -> tuple[int, int]:
    """As :func:`place`, in the last link of the chain that has the slot."""
    for step in reversed(cache.chain):
        if slot in step.values:
            return place((step, number), slot)
    return 0, 0


def is_reachable(value: Value | Overlay | None, device: torch.device) -> bool:
    """Whether a device reads a value by its address; what is not there is looked for elsewhere."""
    rows = value.rows if isinstance(value, Overlay) else value
    if rows is None or isinstance(rows, Tensor):
        return rows is None or rows.device == device
    data, slab = rows.block.data, rows.block.slab
    return data is not None and (data.device == device or (slab is not None and slab.pinned))


def memory(each: Sequence[Link], slots: Sequence[str]) -> list[Tensor]:
    """The memory that the links of a slot lie in."""
    values = [rows_at(link, slot) for link in each for slot in slots]
    found = [v.block.data if isinstance(v, Kept) else v for v in values]
    return list({id(data): data for data in found if data is not None}.values())


def shared_block(each: Sequence[Link], slots: Sequence[str]) -> Block | None:
    """The block that holds these slots, all of them for all samples in order, and nothing else; if there is one."""
    blocks: list[Block] = []
    for number, link in enumerate(each):
        for slot in slots:
            value = link[0].values.get(slot) if link is not None and link[1] == number else None
            if not isinstance(value, Kept) or value.numbers is not None or value.quantized or value.batch != len(each):
                return None
            blocks.append(value.block)
    same = len({id(block) for block in blocks}) == 1
    return blocks[0] if same and list(blocks[0].layout.fields) == list(slots) else None


def addresses(rows: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Int64 ``[slots, B]`` on the host."""
    return torch.from_numpy(np.array(rows, np.int64).reshape(-1, batch))


@dataclass(frozen=True)
class Reach:
    """How a kind of values of one call is fetched.

    ``in_place``: not at all, kernels read it where it lies; ``by_address``: copied by the device itself.
    """

    in_place: bool
    by_address: bool

    @staticmethod
    def of(source: Source, slots: Sequence[str], batch: int, device: torch.device, whole: bool) -> Reach:
        """``whole``: whether all rows are read, so that they may stay where they are."""
        caches = {id(cache): cache for cache, _ in origins(source, batch)}.values()
        in_place = whole and all(cache.is_resident(slots) for cache in caches)
        steps = {id(step): step for cache in caches for step in cache.chain}.values()
        return Reach(in_place, all(is_reachable(step.values.get(slot), device) for step in steps for slot in slots))
