"""The mesh axes that split the rows of an array of tokens, and its sequences."""

import dataclasses
import math
from typing import Final

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsv4_eqx.sharding.rules import entry_of

_BATCH, _CONTEXT, _TENSOR = ("data", "expert"), "context", "tensor"
# Calls in which tokens see other tokens.
_WHOLE_SEQUENCES: Final = ("streams", "hidden_ahead")


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The mesh axes that split rows, and those that split sequences."""

    batch: tuple[str, ...]
    sequence: tuple[str, ...]

    @property
    def spec(self) -> P:
        """The PartitionSpec of an array `[batch, seq, ...]`, or `[batch, ...]`."""
        if not self.batch and not self.sequence:  # an array may have no dimensions
            return P()
        entries = (self.batch, self.sequence) if self.sequence else (self.batch,)
        return P(*map(entry_of, entries))

    def without(self, axis: str) -> "TokenSplit":
        """The same split, where one mesh axis does not split sequences."""
        sequence = tuple(other for other in self.sequence if other != axis)
        return TokenSplit(self.batch, sequence)


def token_split(
    call: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> TokenSplit:
    """How tokens of a shape are split: `()`, `(batch,)` or `(batch, seq, ...)`.

    Rows are split over `data` and `expert`, sequences over `context` and then `tensor`.
    Where a sequence does not divide over `tensor`, its devices have the same tokens.
    Where it does not divide over `context`, neither axis splits it in calls where
    tokens do not see each other, and other calls raise a ValueError.
    """
    sizes = mesh.shape
    batch = tuple(axis for axis in _BATCH if sizes[axis] > 1)
    sequence = tuple(axis for axis in (_CONTEXT, _TENSOR) if sizes[axis] > 1)
    rows = math.prod(sizes[axis] for axis in batch)
    if not shape:  # one token: all devices do the same
        return TokenSplit((), ())
    if shape[0] % rows != 0:
        raise ValueError(
            f"{call}: a batch of shape {shape} does not divide over data="
            f"{sizes['data']} x expert={sizes['expert']}: give a multiple of "
            f"{rows} rows."
        )
    if len(shape) < 2:
        return TokenSplit(batch, ())
    if shape[1] % sizes[_CONTEXT] != 0:
        if call in _WHOLE_SEQUENCES:
            raise ValueError(
                f"{call}: {shape[1]} tokens do not divide over context="
                f"{sizes[_CONTEXT]}: give a multiple of it."
            )
        sequence = ()
    split = TokenSplit(batch, sequence)
    parts = math.prod(sizes[axis] for axis in sequence)
    return split if shape[1] % parts == 0 else split.without(_TENSOR)
