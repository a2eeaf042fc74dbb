"""THE ordered lists: what happens to a captured U-Net, graph by graph.

``canonical`` runs once on the captured graph. The other three start from a copy of its result:

- ``edit``: the packed graph, computing active rows only;
- ``detect``: the dense graph with cross-attention control (the first steps of an edit);
- ``record``: the dense graph that stores what the other two load.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial

from fisedit.passes.base import GraphPass
from fisedit.passes.batch_group_norms import batch_group_norms
from fisedit.passes.canonicalize_attention import canonicalize_attention
from fisedit.passes.canonicalize_ops import canonicalize_ops
from fisedit.passes.compose_linear import compose_linear
from fisedit.passes.control_attention import control_attention
from fisedit.passes.eliminate_repacking import eliminate_repacking
from fisedit.passes.fold_group_norm import fold_group_norm
from fisedit.passes.fold_layer_norm import fold_layer_norm
from fisedit.passes.fuse_attention import fuse_attention
from fisedit.passes.fuse_epilogues import fuse_epilogues
from fisedit.passes.fuse_layer_norm import fuse_layer_norm
from fisedit.passes.fuse_linear import fuse_linear
from fisedit.passes.fuse_norms import fuse_norms
from fisedit.passes.fuse_sums import fuse_sums
from fisedit.passes.fuse_text_attention import fuse_text_attention
from fisedit.passes.hoist_step_invariant import hoist_step_invariant
from fisedit.passes.infer_domains import infer_domains
from fisedit.passes.insert_cache_loads import insert_cache_loads
from fisedit.passes.insert_cache_stores import insert_cache_stores
from fisedit.passes.plan_memory import plan_memory
from fisedit.passes.quantize_stores import quantize_stores
from fisedit.passes.read_in_place import read_in_place
from fisedit.passes.remove_identities import remove_identities
from fisedit.passes.share_stored_maps import share_stored_maps
from fisedit.passes.slots import Slot
from fisedit.passes.sparsify_attention import sparsify_attention
from fisedit.passes.sparsify_conv import sparsify_conv
from fisedit.passes.sparsify_rowwise import sparsify_rowwise
from fisedit.passes.transform_convolutions import transform_convolutions


def canonical_passes() -> list[GraphPass]:
    return [canonicalize_attention, canonicalize_ops, infer_domains]


def edit_passes(
    kv: str, store: Iterable[Slot] = (), fuse: bool = False, quantize: Container[str] = ()
) -> list[GraphPass]:
    """``fuse``: for kernels that gather, multiply and normalize in one (GPUs). ``quantize``: slots, see record."""
    return [
        fold_group_norm,
        sparsify_conv,
        partial(sparsify_attention, kv=kv),
        sparsify_rowwise,
        eliminate_repacking,
        partial(insert_cache_loads, store=store),
        *quantize_passes(quantize),
        *(fuse_passes() if fuse else []),
        hoist_step_invariant,
        plan_memory,
    ]


def fuse_passes() -> list[GraphPass]:
    return [
        remove_identities,
        read_in_place,
        fuse_attention,
        fuse_linear,
        compose_linear,
        fuse_sums,
        batch_group_norms,
        fuse_epilogues,
        fuse_layer_norm,
        fuse_norms,
        fold_layer_norm,
        fuse_text_attention,
        transform_convolutions,
    ]


def detect_passes(store: Iterable[Slot] = (), compiled: bool = False, quantize: Container[str] = ()) -> list[GraphPass]:
    return [*record_passes(store, compiled, quantize), control_attention]


def record_passes(store: Iterable[Slot], compiled: bool = False, quantize: Container[str] = ()) -> list[GraphPass]:
    """``compiled``: for a graph that is compiled for a GPU. ``quantize``: the slots that are stored in 8 bits."""
    shared = [share_stored_maps] if compiled else []
    return [partial(insert_cache_stores, slots=store), *shared, *quantize_passes(quantize)]


def quantize_passes(slots: Container[str]) -> list[GraphPass]:
    return [partial(quantize_stores, slots=slots)] if slots else []
