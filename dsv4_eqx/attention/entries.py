"""Compressed entries: what they are, who sees them, and where they lie.

A layer's entries are an array of their own, or lie among those of all layers, as in a
cache that a scan over layers extends: to take them out and put them back would copy
the whole cache for each token. The functions that read and write take both.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class StackedEntries(eqx.Module):
    """One layer's entries, where they lie among those of all layers; no gradient."""

    stack: Float[Array, "layers batch entries head_dim"]
    layer: Int[Array, ""] | int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's own."""
        return self.stack.shape[1:]


# A layer's values, in either form.
Values = Float[Array, "batch entries head_dim"] | StackedEntries


class Entries(eqx.Module):
    """Compressed entries that queries may look at.

    A query sees an entry of its own owner if the last of the tokens in it is not after
    the query. What a cache has not filled yet is after every query.
    """

    values: Values
    last_positions: Int[Array, "batch entries"]
    # The document that each belongs to; None where a row is a single one.
    owners: Int[Array, "batch entries"] | None = None


def visible(
    entries: Entries,
    positions: Int[Array, "batch seq"],
    owners: Int[Array, "batch seq"] | None = None,
) -> Bool[Array, "batch seq entries"]:
    """Whether an entry has the query's owner and its last token is not after the query.

    **Arguments:**

    - `entries`: the compressed entries.
    - `positions`: of the queries.
    - `owners`: of the queries, if the entries have owners.

    **Raises:** ValueError if only queries or only entries have owners.
    """
    if (owners is None) != (entries.owners is None):
        which = "entries" if owners is None else "queries"
        raise ValueError(f"only the {which} have owners: give both owners, or neither.")
    seen = entries.last_positions[:, None, :] <= positions[:, :, None]
    if owners is not None and entries.owners is not None:
        seen &= entries.owners[:, None, :] == owners[:, :, None]
    return seen


def tile_of(
    values: Values, begin: Int[Array, ""] | int, size: int
) -> Float[Array, "batch size head_dim"]:
    """Consecutive entries of each row.

    **Arguments:**

    - `values`: of the entries.
    - `begin`: the first of them.
    - `size`: how many.
    """
    at = _stacked(values)
    batch, _, dim = at.shape
    start, sizes = (at.layer, 0, begin, 0), (1, batch, size, dim)
    return lax.dynamic_slice(at.stack, start, sizes)[0]


def gathered(
    values: Values, index: Int[Array, "batch block selected"]
) -> Float[Array, "batch block selected head_dim"]:
    """Some entries for each query; any for a negative index.

    **Arguments:**

    - `values`: of the entries.
    - `index`: which of its row's a query is given; never past the last.
    """
    at, index = _stacked(values), jnp.maximum(index, 0)
    place = at.layer, _rows(index), index
    return at.stack.at[place].get(mode="promise_in_bounds")


def scattered(
    gradients: Float[Array, "batch block selected head_dim"],
    index: Int[Array, "batch block selected"],
    num_entries: int,
) -> Float[Array, "batch entries head_dim"]:
    """The transpose of `gathered`: each entry's sum, where those of none are zero.

    **Arguments:**

    - `gradients`: of what was gathered; zero where the index is negative.
    - `index`: as for `gathered`.
    - `num_entries`: in a row.
    """
    batch, *_, dim = gradients.shape
    zeros = jnp.zeros_like(gradients, shape=(batch, num_entries, dim))
    index = jnp.maximum(index, 0)
    return zeros.at[_rows(index), index].add(gradients, mode="promise_in_bounds")


def replaced(
    values: Values,
    index: Int[Array, "batch new"],
    new: Float[Array, "batch new head_dim"],
) -> Values:
    """The entries with some of them replaced.

    **Arguments:**

    - `values`: of the entries.
    - `index`: which; past the last for none.
    - `new`: what to put there.
    """
    at = _stacked(values)
    stack = at.stack.at[at.layer, _rows(index), index].set(new, mode="drop")
    return _like(values, stack)


def _stacked(values: Values) -> StackedEntries:
    if isinstance(values, StackedEntries):
        return values
    return StackedEntries(values[None], 0)


def _like(values: Values, stack: Array) -> Values:
    if isinstance(values, StackedEntries):
        return StackedEntries(stack, values.layer)
    return jnp.squeeze(stack, 0)


def _rows(index: Int[Array, "batch ..."]) -> Int[Array, "batch ..."]:
    batch = jnp.arange(index.shape[0], dtype=index.dtype)
    return batch.reshape(-1, *[1] * (index.ndim - 1))
