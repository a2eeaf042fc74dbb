"""Where the samples of a call find their recorded values: link by link of a chain of edits, by address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime.cache.block import Block
from fisedit.runtime.cache.store import Places, StackedCache, StepCache

Source = StepCache | StackedCache


@dataclass(frozen=True)
class Links:
    """One link of the chain of every sample: the dense recordings, or what edits put over them.

    Attributes:
        begins, scales: addresses of each sample's rows and of their scales, int64 ``[slots, B]``; 0: there are none.
        places: of each sample's link; ``None`` where its chain is shorter than others'. samples: its number in it.
    """

    begins: np.ndarray
    scales: np.ndarray
    places: tuple[Places | None, ...]
    samples: tuple[int, ...]

    @staticmethod
    def of(chain: Sequence[tuple[StepCache, int] | None], slots: tuple[str, ...]) -> Links:
        """The links of all samples, each a cache and the sample's number in it."""
        places = tuple(None if link is None else link[0].places(slots) for link in chain)
        samples = tuple(0 if link is None else link[1] for link in chain)
        nothing = np.zeros(len(slots), np.int64)
        each = list(zip(places, samples, strict=True))
        begins = np.stack([nothing if p is None else p.begins[:, n] for p, n in each], 1)
        scales = np.stack([nothing if p is None else p.scales[:, n] for p, n in each], 1)
        return Links(begins, scales, places, samples)

    @property
    def names(self) -> tuple[tuple[int, ...], ...]:
        """Tells links whose overlays replace the same rows."""
        return tuple(() if places is None else places.names for places in self.places)

    def index(self, slot: int, sample: int) -> Tensor | None:
        """Which rows int64 ``[N]`` a sample's overlay of slot number ``slot`` replaces; ``None`` if it is none."""
        places = self.places[sample]
        index = None if places is None else places.indexes[slot]
        return None if index is None else index[self.samples[sample] % len(index)]

    @property
    def alone(self) -> Block | None:
        """The block that holds these slots for all samples, in order, and nothing but their scales; if there is one."""
        first = self.places[0]
        same = all(places is first for places in self.places) and self.samples == tuple(range(len(self.samples)))
        whole = same and first is not None and first.begins.shape[1] == len(self.samples)
        return first.alone if whole and first is not None else None

    @property
    def memory(self) -> list[Tensor]:
        """What must stay alive while the addresses are used."""
        return [data for places in self.places if places is not None for data in places.memory]


def origins(source: Source, batch: int) -> list[tuple[StepCache, int]]:
    """For each sample of a call, the recorded call that it reads, and its number in that."""
    return list(source.origins) if isinstance(source, StackedCache) else [(source, n) for n in range(batch)]


def links(source: Source, batch: int, slots: tuple[str, ...]) -> list[Links]:
    """The links of all samples, depth by depth: the dense recordings first, then what edits put over them."""
    chains = [(cache.chain, sample) for cache, sample in origins(source, batch)]
    depths = range(max(len(chain) for chain, _ in chains))
    return [Links.of([(c[d], n) if d < len(c) else None for c, n in chains], slots) for d in depths]


def newest(source: Source, batch: int, slots: tuple[str, ...]) -> np.ndarray:
    """The address of each sample's value in the last link that has the slot: int64 ``[slots, B]``."""
    found = np.zeros((len(slots), batch), np.int64)
    for link in links(source, batch, slots):
        found = np.where(link.begins > 0, link.begins, found)
    return found


@dataclass(frozen=True)
class Reach:
    """How a kind of values of one call is fetched.

    ``in_place``: not at all, kernels read it where it lies; ``by_address``: copied by the device itself.
    """

    in_place: bool
    by_address: bool

    @staticmethod
    def of(source: Source, slots: tuple[str, ...], batch: int, device: torch.device, whole: bool) -> Reach:
        """``whole``: whether all rows are read, so that they may stay where they are."""
        caches = list({id(cache): cache for cache, _ in origins(source, batch)}.values())
        in_place = whole and all(cache.is_resident(slots) for cache in caches)
        steps = {id(step): step for cache in caches for step in cache.chain}.values()
        return Reach(in_place, all(step.places(slots).is_reachable(device) for step in steps))
