"""Keep what a session records: by kind in blocks, on the tiers that have room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisedit.runtime.cache.block import SCALE, Kept, Kind, Use
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.cache.tiers import Ring, Tiers
from fisedit.runtime.executor import Store
from fisedit.runtime.kernels.quantize_rows.reference import quantize_rows


@dataclass
class Writer:
    """What stores the values of one session, behind its computing.

    Attributes:
        stored: bytes kept so far, by kind.
    """

    tiers: Tiers
    stored: dict[Kind, int] = field(default_factory=dict)
    _ring: Ring | None = None

    def keep(
        self, values: Mapping[Store, Tensor], uses: Mapping[str, Use], batch: int, kinds: frozenset[Kind] | None = None
    ) -> dict[str, Kept]:
        """Copies of recorded values, by slot; the values may be overwritten after this on the same stream.

        Args:
            uses: how slots are read.
            batch: samples that they have.
            kinds: what to keep; ``None`` is all.
        """
        groups: dict[Kind, dict[str, Tensor]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for store, value in values.items():
            kind = uses[store.slot.removeprefix(SCALE)].kind
            if kinds is None or kind in kinds:
                groups.setdefault(kind, {})[store.slot] = value
                dtypes[store.slot] = store.dtype or value.dtype
        if self._ring is None:
            self._ring = self.tiers.ring(sum(value.nbytes for group in groups.values() for value in group.values()))
        kept: dict[str, Kept] = {}
        for kind, group in groups.items():
            block = self.tiers.store(kind, group, self._ring)
            self.stored[kind] = self.stored.get(kind, 0) + block.nbytes
            kept |= {s: Kept(block, s, dtypes[s], batch) for s in group if not s.startswith(SCALE)}
        return kept

    def adopt(
        self, values: Mapping[str, Tensor], kinds: Mapping[Kind, Mapping[str, torch.dtype]], batch: int
    ) -> dict[str, Kept]:
        """The values of a call that lie mapped in a saved file, by slot; see :meth:`Tiers.adopt`.

        Args:
            kinds: the slots of each kind in the order of its block, and what they were recorded in.
            batch: samples that they have.
        """
        self._ring = self._ring or self.tiers.ring(0)  # nothing comes from the GPU
        kept: dict[str, Kept] = {}
        for kind, dtypes in kinds.items():
            block = self.tiers.adopt(kind, {slot: values[slot] for slot in dtypes}, self._ring.began)
            kept |= {s: Kept(block, s, dtype, batch) for s, dtype in dtypes.items() if not s.startswith(SCALE)}
        return kept

    def keep_again(self, cache: StepCache) -> dict[str, Kept]:
        """A whole copy of what a chain of edits has come to, stored as the dense recording was."""
        values: dict[Store, Tensor] = {}
        uses: dict[str, Use] = {}
        for slot, root in cache.chain[0].values.items():
            value = cache.load(slot)
            if isinstance(root, Kept):
                uses[slot] = Use(root.block.kind)
            if isinstance(root, Kept) and root.quantized:
                values[Store(slot, None, value.dtype)], values[Store(SCALE + slot, None)] = quantize_rows(value)
            else:
                values[Store(slot, None)] = value
        return self.keep(values, uses, cache.batch)
