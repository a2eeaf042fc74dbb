"""Where the pixels are: a tensor's dimensions as lists of atoms (batch, y, x, everything else).

A convolution map ``[B, C, H, W]``, a token sequence ``[B, H*W, C]`` and attention heads ``[B*h, H*W, d]`` hold the same
positions in different layouts. Tracking atoms through views and permutes (never comparing sizes) tells for every value
how to reach its *rows form* ``[B, R, C]``: one row per position, all other atoms merged into ``C`` in their order.
In that form the layout changes of the dense model are no-ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from fisedit.runtime.geometry import Level


class LayoutError(ValueError):
    """The rows of a value cannot be followed through an op; the message is shown by ``inspect``."""


class Kind(Enum):
    BATCH = "batch"
    Y = "y"
    X = "x"
    OTHER = "other"


@dataclass(frozen=True, eq=False)
class Atom:
    """An indivisible part of a dimension. ``level`` is set on the spatial kinds."""

    kind: Kind
    size: int
    level: Level | None = None

    @property
    def spatial(self) -> bool:
        return self.level is not None

    def __repr__(self) -> str:
        return f"{self.kind.value}:{self.size}"


Dim = tuple[Atom, ...]


def fresh_dim(size: int, kind: Kind = Kind.OTHER) -> Dim:
    """A dimension of one atom; channels of size 1 need none."""
    return (Atom(kind, size),) if size != 1 or kind is not Kind.OTHER else ()


@dataclass(frozen=True, eq=False)
class Layout:
    """The dimensions of a value that has one row per position of ``level``."""

    dims: tuple[Dim, ...]

    @staticmethod
    def of_map(shape: Sequence[int]) -> Layout:
        """The layout of a map ``[B, C, H, W]``."""
        batch, channels, height, width = (int(size) for size in shape)
        level = (height, width)
        y, x = Atom(Kind.Y, height, level), Atom(Kind.X, width, level)
        return Layout((fresh_dim(batch, Kind.BATCH), fresh_dim(channels), (y,), (x,)))

    @property
    def atoms(self) -> list[Atom]:
        return [atom for dim in self.dims for atom in dim]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def level(self) -> Level:
        return next(atom.level for atom in self.atoms if atom.level is not None)

    @property
    def batch(self) -> int:
        return math.prod(atom.size for atom in self.atoms if atom.kind is Kind.BATCH)

    @property
    def channels(self) -> int:
        return math.prod(atom.size for atom in self.atoms if atom.kind is Kind.OTHER)

    @property
    def factors(self) -> tuple[int, ...]:
        """How ``C`` factors: the channel atoms' product of each dimension that has any (heads beside the batch too)."""
        products = (math.prod(a.size for a in dim if a.kind is Kind.OTHER) for dim in self.dims if _channels_in(dim))
        return tuple(products)

    def factor_index(self, dim: int) -> int:
        """The place of dimension ``dim`` among ``factors``.

        Raises:
            LayoutError: the dimension holds batch or spatial atoms, or has size 1.
        """
        dim %= len(self.dims)
        if not self.dims[dim] or not _only(self.dims[dim], Kind.OTHER):
            raise LayoutError(f"dimension {dim} of {self} is not a channel dimension of its own")
        return sum(1 for d in self.dims[:dim] if _channels_in(d))

    def factors_under(self, full: Layout) -> list[int]:
        """The ``factors`` of a value that broadcasts to one of layout ``full``: 1 where it broadcasts.

        Raises:
            LayoutError: a dimension meets one of another kind.
        """
        factors = []
        for own, other in zip(((),) * (len(full.dims) - len(self.dims)) + self.dims, full.dims, strict=True):
            if math.prod(a.size for a in own) != 1 and _merged(own) != _merged(other):
                raise LayoutError(f"{self} does not broadcast to {full} by positions")
            if _channels_in(other):
                factors.append(math.prod(a.size for a in own if a.kind is Kind.OTHER))
        return factors

    @property
    def is_map(self) -> bool:
        """Whether it is ``[B, C, H, W]``."""
        kinds = [{atom.kind for atom in dim} for dim in self.dims]
        return len(kinds) == 4 and kinds[0] <= {Kind.BATCH} and kinds[1] <= {Kind.OTHER} and kinds[2:] == [
            {Kind.Y}, {Kind.X}]  # fmt: skip

    def with_dim(self, dim: int, size: int) -> Layout:
        """The same layout with dimension ``dim`` replaced by a fresh one of ``size``."""
        dims = list(self.dims)
        dims[dim] = fresh_dim(size)
        return Layout(tuple(dims))

    def matches(self, other: Layout) -> bool:
        """Whether two values can be combined element by element in rows form."""
        return self._signature() == other._signature()

    def same_rows(self, other: Layout) -> bool:
        """Whether the rows forms agree: same level, batch, and channel atoms of the same sizes in the same order."""
        return (self.level, self.batch, self.channels) == (other.level, other.batch, other.channels)

    def _signature(self) -> list[list[tuple[Kind, Level | None, int]]]:
        return [_merged(dim) for dim in self.dims]

    def permute(self, order: Sequence[int]) -> Layout:
        """The layout of ``x.permute(order)``; an order that swaps channel atoms among themselves is refused."""
        permuted = Layout(tuple(self.dims[i] for i in order))
        return _checked(permuted, [a for a in self.atoms if a.kind is Kind.OTHER])

    def view(self, shape: Sequence[int]) -> Layout:
        """The layout of ``x.reshape(shape)``, by splitting and merging atoms in order.

        Raises:
            LayoutError: a position dimension would be split, or sizes do not factor.
        """
        pending = list(self.atoms)
        dims = [_take(pending, int(size), _next_size(shape, i)) for i, size in enumerate(shape)]
        if any(atom.size > 1 for atom in pending):
            raise LayoutError(f"{self} cannot be viewed as {tuple(shape)}")
        if pending:
            dims[-1] = dims[-1] + tuple(pending)
        return _checked(Layout(tuple(dims)))

    def __repr__(self) -> str:
        return "[" + ", ".join("*".join(map(repr, dim)) or "1" for dim in self.dims) + "]"


def _only(dim: Iterable[Atom], kind: Kind) -> bool:
    return all(atom.kind is kind for atom in dim)


def _channels_in(dim: Dim) -> bool:
    return any(atom.kind is Kind.OTHER for atom in dim)


def _merged(dim: Dim) -> list[tuple[Kind, Level | None, int]]:
    """A dimension with neighboring atoms of one kind merged."""
    parts: list[tuple[Kind, Level | None, int]] = []
    for atom in dim:
        if parts and parts[-1][0] is atom.kind and not atom.spatial:
            parts[-1] = (atom.kind, None, parts[-1][2] * atom.size)
        else:
            parts.append((atom.kind, atom.level, atom.size))
    return parts


def _next_size(shape: Sequence[int], i: int) -> int | None:
    return int(shape[i + 1]) if i + 1 < len(shape) else None


def _take(pending: list[Atom], size: int, following: int | None) -> Dim:
    """Remove from ``pending`` the atoms of a dimension of ``size`` and return them.

    Of size 1 there are only batch, y and x: they go with this dimension, unless x has the next one for itself.
    """
    dim: list[Atom] = []
    left = size
    while left > 1:
        if not pending:
            raise LayoutError(f"no atoms left for a dimension of size {size}")
        atom = pending.pop(0)
        if left % atom.size == 0:
            left //= atom.size
        elif atom.size % left == 0 and atom.kind is Kind.OTHER:
            pending.insert(0, Atom(Kind.OTHER, atom.size // left))
            atom, left = Atom(Kind.OTHER, left), 1
        else:
            raise LayoutError(f"a dimension of size {size} would split {atom}")
        dim.append(atom)
    if size == 1 and pending and pending[0].size == 1:
        dim.append(pending.pop(0))
    if dim and dim[-1].kind is Kind.Y and pending and pending[0].size == 1 and following != 1:
        dim.append(pending.pop(0))
    return tuple(dim)


def _checked(layout: Layout, order: list[Atom] | None = None) -> Layout:
    """Raise unless y is directly followed by x and the channel atoms kept their order.

    A single line or column may stand anywhere (a head count of 1 takes its place in views): it is put beside the other.
    """
    atoms = layout.atoms
    if order is not None and [a for a in atoms if a.kind is Kind.OTHER] != order:
        raise LayoutError("channel dimensions change places")
    spatial = [i for i, atom in enumerate(atoms) if atom.spatial]
    kinds = [atoms[i].kind for i in spatial]
    if kinds == [Kind.Y, Kind.X] and spatial[1] == spatial[0] + 1:
        return layout
    y, x = (
        sorted((atoms[i] for i in spatial), key=lambda atom: atom.kind is Kind.X) if len(spatial) == 2 else (None, None)
    )
    if y is None or x is None or min(y.size, x.size) > 1:
        raise LayoutError(f"y and x are not neighbors in {layout}")
    stays = y if x.size == 1 else x
    pair = {y: (), x: ()} | {stays: (y, x)}
    return Layout(tuple(tuple(new for atom in dim for new in pair.get(atom, (atom,))) for dim in layout.dims))
