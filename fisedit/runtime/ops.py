"""The semantic ops of namespace ``fisedit``: schemas and shape rules, torch only.

Passes write graphs in these ops; ``passes/lower.py`` gives each one a provider from ``runtime/kernels``.
Letters: B batch, M masks (1 when one mask is shared by the batch, else B), N active rows of a level,
H halo rows, R all rows of a level, C channels, T tiles or parts of the channels, L text tokens, S channels of all norms
together.
"""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.fx.node import has_side_effect

namespace = library.Library("fisedit", "DEF")

_PRODUCT = (
    "Tensor rows, Tensor? rows2, Tensor? recorded, Tensor? sources, Tensor weight, Tensor? bias, Tensor? affine, "
    "bool full, Tensor? residual, Tensor count, Tensor locks, str activation, bool gated, int positions, "
    "Tensor? rows3=None, Tensor? moments=None, Tensor? center=None, float input_eps=0.0"
)

_BLOCKS = "Tensor? block_sources=None, Tensor? block_count=None, Tensor? places=None, Tensor? block_weight=None"

SCHEMAS = {
    # Structural: say what a value is; resolved by insert_cache and lower, never executed.
    "pack": "(Tensor dense) -> Tensor",
    "unpack": "(Tensor rows) -> Tensor",
    "halo": "(Tensor dense, Tensor index) -> Tensor",
    "recorded": "(Tensor dense) -> Tensor",
    "table": "(str key) -> Tensor",
    "cache_load": "(str slot, Tensor? index=None) -> Tensor",
    "cache_view": "(str slot) -> Tensor",
    "cache_store": "(Tensor value, str slot) -> ()",
    # Computing: each has a reference kernel.
    "gather_rows": "(Tensor rows, Tensor index) -> Tensor",
    "scatter_rows": "(Tensor base, Tensor index, Tensor rows) -> Tensor",
    "sparse_conv": "(Tensor rows, Tensor halo, Tensor table, Tensor? out_index, Tensor weight, Tensor? bias, "
    "int[] kernel_size, int[] stride, int[] dilation, int groups) -> Tensor",
    "group_norm_rows": "(Tensor rows, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? shift, "
    "float eps, int positions, Tensor? count=None) -> Tensor",
    "group_norm_stats": "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    "row_attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, float? scale, "
    "Tensor? key_count=None) -> Tensor",
    "controlled_attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor query_recorded, "
    "Tensor key_recorded, Tensor index, Tensor weight, int heads, float? scale) -> Tensor",
    "quantize_rows": "(Tensor rows) -> (Tensor, Tensor)",
    # Fused: what a GPU runs in their place (passes/pipeline.py, fuse_passes).
    "multiply_rows": f"({_PRODUCT}, *, {_BLOCKS}) -> Tensor",
    "multiply_norm_rows": f"({_PRODUCT}, *, Tensor? norm_affine=None, bool norm_full=False, "
    'str norm_activation="none", Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-05, '
    f"bool norm_moments=False, {_BLOCKS}) -> (Tensor, Tensor, Tensor)",
    "multiply_attend_rows": f"({_PRODUCT}, *, Tensor key, Tensor value, int heads, float? scale=None) -> Tensor",
    "attend_rows": "(Tensor query, Tensor key, Tensor value, Tensor? recorded_key, Tensor? recorded_value, "
    "Tensor? table, Tensor count, Tensor? key_count, Tensor locks, int heads, float? scale) "
    "-> Tensor",
    "gather_patches": "(Tensor rows, Tensor? recorded, Tensor sources, Tensor count) -> Tensor",
    "layer_norm_rows": "(Tensor rows, Tensor? weight, Tensor? bias, float eps, Tensor count) -> Tensor",
    "normalize_rows": "(Tensor rows, Tensor? rows2, Tensor affine, str activation, Tensor count, bool done) -> Tensor",
    "renew_affine": "(Tensor rows, Tensor? rows2, Tensor affine, bool full, Tensor? weight, Tensor? bias, "
    "Tensor? shift, int groups, float eps, Tensor counts) -> Tensor",
    "fold_group_norms": "(Tensor[] recorded, int[] means, int[] rstds, int[] groups, int[] channels, Tensor weight, "
    "Tensor bias, Tensor? shift) -> Tensor",
}

STRUCTURAL = ("pack", "unpack", "halo", "recorded", "table", "cache_load", "cache_view", "cache_store")

for _name, _schema in SCHEMAS.items():
    namespace.define(_name + _schema)

has_side_effect(torch.ops.fisedit.cache_store.default)


@library.register_fake("fisedit::gather_rows", lib=namespace)
def _(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], index.shape[1], rows.shape[2])  # [B, N, C]


@library.register_fake("fisedit::scatter_rows", lib=namespace)
def _(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(base)  # [B, R, C]


@library.register_fake("fisedit::sparse_conv", lib=namespace)
def _(rows, halo, table, out_index, weight, bias, kernel_size, stride, dilation, groups):
    count = table.shape[1] if out_index is None else out_index.shape[1]
    return rows.new_empty(rows.shape[0], count, weight.shape[0])  # [B, N', Co]


@library.register_fake("fisedit::group_norm_rows", lib=namespace)
def _(rows, mean, rstd, weight, bias, shift, eps, positions, count=None):
    return torch.empty_like(rows)  # [B, N, C]


@library.register_fake("fisedit::group_norm_stats", lib=namespace)
def _(x, groups, weight, bias, eps):
    stats = x.new_empty(x.shape[0], groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), stats, torch.empty_like(stats)


@library.register_fake("fisedit::row_attention", lib=namespace)
def _(query, key, value, mask, heads, scale, key_count=None):
    return query.new_empty(query.shape[0], query.shape[1], heads * value.shape[-1])  # [B, N, h*d]


@library.register_fake("fisedit::controlled_attention", lib=namespace)
def _(query, key, value, mask, query_recorded, key_recorded, index, weight, heads, scale):
    return query.new_empty(query.shape[0], query.shape[1], heads * value.shape[-1])  # [B, R, h*d]


@library.register_fake("fisedit::quantize_rows", lib=namespace)
def _(rows):
    quantized = rows.new_empty(rows.shape, dtype=torch.int8)  # [B, N, C]
    return quantized, rows.new_empty(rows.shape[:2], dtype=torch.float32)  # [B, N]


@library.register_fake("fisedit::multiply_rows", lib=namespace)
def _multiply_rows(rows, rows2, recorded, sources, weight, bias, affine, full, residual, count, locks, activation,
                   gated, positions, rows3=None, moments=None, center=None,
                   input_eps=0.0, **blocks):  # fmt: skip
    number = rows.shape[1] if sources is None else sources.shape[1]
    return rows.new_empty(rows.shape[0], number, weight.shape[0] // (2 if gated else 1))  # [B, N', Co]


@library.register_fake("fisedit::multiply_norm_rows", lib=namespace)
def _(*product, **norm):
    out = _multiply_rows(*product)
    parts = -(-out.shape[2] // 64) if norm.get("norm_moments") else 0  # about as many tiles as a kernel has
    return out, torch.empty_like(out), out.new_empty(2, parts, *out.shape[:2], dtype=torch.float32)


@library.register_fake("fisedit::multiply_attend_rows", lib=namespace)
def _(*product, **text):
    return _multiply_rows(*product)  # [B, N', h*d]


@library.register_fake("fisedit::attend_rows", lib=namespace)
def _(query, key, value, recorded_key, recorded_value, table, count, key_count, locks, heads, scale):
    return query.new_empty(query.shape)  # [B, N, h*d]


@library.register_fake("fisedit::gather_patches", lib=namespace)
def _(rows, recorded, sources, count):
    return rows.new_empty(rows.shape[0], *sources.shape[1:], rows.shape[2])  # [B, N', taps, C]


@library.register_fake("fisedit::layer_norm_rows", lib=namespace)
def _(rows, weight, bias, eps, count):
    return rows.new_empty(rows.shape)  # [B, N, C]


@library.register_fake("fisedit::normalize_rows", lib=namespace)
def _(rows, rows2, affine, activation, count, done):
    return rows.new_empty(*rows.shape[:2], affine.shape[-1])  # [B, N, C]


@library.register_fake("fisedit::renew_affine", lib=namespace)
def _(rows, rows2, affine, full, weight, bias, shift, groups, eps, counts):
    return torch.empty_like(affine)  # [2, B, C]


@library.register_fake("fisedit::fold_group_norms", lib=namespace)
def _(recorded, means, rstds, groups, channels, weight, bias, shift):
    return weight.new_empty(2, recorded[0].shape[0], weight.shape[0])  # [2, B, S]
