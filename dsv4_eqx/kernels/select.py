"""The indexer's scores and the best of them.

Paper section 2.3.1, eq. 16: small heads score every entry, rectified and weighted. The
best are found through the lowest score that is still in, bit by bit: far cheaper than
sorting.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsv4_eqx.kernels.entries import Entries, Selection, flat_entries, tile_of
from dsv4_eqx.kernels.form import Form, current_form, is_reference

# Attending to an entry of one's own costs about this many times one in common.
GATHER_COST: Final = 4
_WORD: Final = 32  # marks in an integer
_MOST_SCORES: Final = 1 << 27  # that exist at a time on a GPU
_DIGIT: Final = 4  # bits that a step on a GPU or TPU decides


def select(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    seen: Bool[Array, "batch block entries"],
    keys: Entries,
    topk: int,
) -> Selection:
    """The `topk` entries with the highest scores among those that each query sees."""
    if is_reference():
        return select_reference(queries, weights, seen, keys, topk)
    return _choose(_scores_of_seen(queries, weights, seen, keys), seen, topk)


def _scores_of_seen(queries, weights, seen, keys):
    return jnp.where(seen, score(queries, weights, keys, seen), -jnp.inf)


def _choose(scores, seen, topk):
    """The best entries, in the form of a selection that suits the machine."""
    form, num_entries = current_form(), scores.shape[-1]
    if form.hopper:
        return listed(seen & highest(scores, topk), min(topk, num_entries))
    if num_entries <= GATHER_COST * topk:
        return seen & highest(scores, topk)
    if not form.stops_early:
        return listed(seen & highest(scores, topk), topk)
    best, index = lax.top_k(scores, min(topk, num_entries))
    return jnp.where(best == -jnp.inf, -1, index)


def select_reference(queries, weights, seen, keys, topk):
    """What `select` does: by sorting, equal scores in the order of entries."""
    values = tile_of(keys.values, 0, keys.shape[1])
    scores = score_reference(queries, weights, values)
    scores = jnp.where(seen, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return seen & (rank < topk)


def select_with_scores(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    seen: Bool[Array, "batch block entries"],
    keys: Entries,
    topk: int,
) -> tuple[Selection, Int[Array, "batch block best"], Float[Array, "batch block best"]]:
    """What `select` gives; the indices of the same entries in order; their scores.

    Lists are filled up with -1 and minus infinity.
    """
    if is_reference():
        values = tile_of(keys.values, 0, keys.shape[1])
        scores = score_reference(queries, weights, values)
        selection = marks = select_reference(queries, weights, seen, keys, topk)
    else:
        scores = _scores_of_seen(queries, weights, seen, keys)
        selection, marks = _choose(scores, seen, topk), seen & highest(scores, topk)
    index = listed(marks, min(topk, scores.shape[-1]))
    best = jnp.take_along_axis(scores, jnp.maximum(index, 0), axis=-1)
    return selection, index, jnp.where(index < 0, -jnp.inf, best)


def score_reference(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    values: Float[Array, "batch entries index_dim"],
) -> Float[Array, "batch block entries"]:
    """What `score` computes of every entry, all products at once."""
    products = jnp.einsum(
        "bqhc,bec->bqhe", queries, values, preferred_element_type=weights.dtype
    )
    return jnp.einsum(
        "bqhe,bqh->bqe",
        jax.nn.relu(products),
        weights,
        precision=lax.Precision.HIGHEST,
    )


def score(
    queries: Float[Array, "batch block index_heads index_dim"],
    weights: Float[Array, "batch block index_heads"],
    keys: Entries,
    seen: Bool[Array, "batch block entries"],
) -> Float[Array, "batch block entries"]:
    """Float32 scores, tile by tile; what no query sees may have any."""
    form = current_form()
    if form.hopper and _fits_hopper(queries, keys):
        scores = _score_on_hopper(queries, weights, keys, seen)
    else:
        scores = _score_by_tiles(queries, weights, keys, seen, form)
    return jnp.where(scores == 0, 0.0, scores)  # -0.0 and 0.0 are one score


def query_block(keys: Entries) -> int:
    """How many queries to give to `select` at a time."""
    form = current_form()
    if not form.hopper:
        return form.query_block
    # No more scores at a time than fit into half a gigabyte.
    most = _MOST_SCORES // max(keys.shape[1], 1)
    return max(_WORD, min(form.hopper_query_block, most // _WORD * _WORD))


def _fits_hopper(queries: Array, keys: Entries) -> bool:
    heads, dim = queries.shape[2:]
    is_half = queries.dtype in (jnp.bfloat16, jnp.float16)
    fits = heads % 8 == 0 and heads <= 128 and dim % 64 == 0
    return fits and is_half and queries.dtype == keys.values.dtype


def _score_on_hopper(queries, weights, keys, seen):
    # Pallas is imported where it is used: most users have no such GPU.
    from dsv4_eqx.kernels.hopper_scores import index_scores

    num_entries = keys.shape[1]
    rows, first = flat_entries(keys.values)
    place = jnp.arange(1, num_entries + 1, dtype=jnp.int32)
    weights = weights.astype(jnp.float32)
    num_seen = jnp.max(jnp.where(seen, place, 0), axis=2)
    return index_scores(queries, weights, rows, first, num_entries, num_seen)


def _score_by_tiles(queries, weights, keys, seen, form):
    batch, block = queries.shape[:2]
    num_entries = keys.shape[1]
    tile = min(form.entry_tile, num_entries)
    tiles = _tiles(seen, tile, keys.segment_ids is not None, form)

    def score_tile(i, scores):
        # The last tile reaches back into the one before.
        begin = jnp.minimum(i * tile, num_entries - tile)
        part = tile_of(keys.values, begin, tile)
        products = jnp.einsum(
            "bqhc,bec->bqhe", queries, part, preferred_element_type=weights.dtype
        )
        # Rows of queries: XLA on CPU is slow to reduce [1, block, heads, entries]. A
        # product: the reduction of a single row would take the one above into its loop.
        rows = jax.nn.relu(products).reshape(batch * block, -1, tile)
        part = jnp.einsum(
            "rhe,rh->re",
            rows,
            weights.reshape(batch * block, -1),
            precision=lax.Precision.HIGHEST,
        )
        part = part.reshape(batch, block, tile).astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(scores, part, begin, axis=2)

    scores = jnp.zeros_like(queries, jnp.float32, shape=(batch, block, num_entries))
    return lax.fori_loop(*tiles, score_tile, scores)


def _tiles(
    seen: Bool[Array, "batch block entries"],
    tile: int,
    has_documents: bool,
    form: Form,
) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Tiles up to the last entry that any query sees; from the first, of documents."""
    num_entries = seen.shape[2]
    if not form.stops_early:
        return 0, -(-num_entries // tile)
    any_sees = jnp.any(seen, axis=(0, 1))
    index = jnp.arange(num_entries)
    end = jnp.max(jnp.where(any_sees, index, -1)) // tile + 1
    if not has_documents:
        return 0, end
    return jnp.min(jnp.where(any_sees, index, num_entries)) // tile, end


def highest(
    scores: Float[Array, "batch block entries"], count: int
) -> Bool[Array, "batch block entries"]:
    """Marks the `count` highest scores of each row; of equal ones, the earlier.

    All are marked where there are no more than `count` above minus infinity.
    """
    if current_form().stops_early:
        return _highest_by_bits(scores, count)
    return _highest_by_digits(scores, count)


def _highest_by_bits(scores: Array, count: int) -> Array:
    """A bit a round; ties are broken where there are any."""
    ordered = _ordered(scores)

    def decide_bit(bit, threshold):
        raised = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        reached = jnp.sum(ordered >= raised[..., None], axis=-1) >= count
        return jnp.where(reached, raised, threshold)

    lowest = jnp.zeros_like(ordered, shape=ordered.shape[:-1])
    lowest = lax.fori_loop(0, 32, decide_bit, lowest)[..., None]
    marked = ordered >= lowest
    is_tied = (jnp.sum(marked, axis=-1, keepdims=True) > count) & (
        lowest > _ordered(jnp.array(-jnp.inf, jnp.float32))
    )

    def break_ties(marked):
        broken = _earliest_of_equal(ordered, lowest, count, jnp.cumsum)
        return jnp.where(is_tied, broken, marked)

    return lax.cond(jnp.any(is_tied), break_ties, lambda marked: marked, marked)


def _highest_by_digits(scores: Array, count: int) -> Array:
    """Several bits a step, unrolled, so that nothing waits for the host."""
    ordered = _ordered(scores)
    lowest = jnp.zeros_like(ordered, shape=(*ordered.shape[:-1], 1))
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        # How many of the raised thresholds still have `count` scores at or above them.
        reached = (
            jnp.sum(ordered >= lowest + jnp.uint32(digit << shift), -1, keepdims=True)
            >= count
            for digit in range(1, 1 << _DIGIT)
        )
        digit = sum(x.astype(jnp.uint32) for x in reached)
        lowest = lowest + (digit << shift)
    return _earliest_of_equal(ordered, lowest, count, _prefix_sums)


def _earliest_of_equal(
    ordered: UInt32[Array, "batch block entries"],
    lowest: UInt32[Array, "batch block 1"],
    count: int,
    prefix_sums: Callable[..., Array],
) -> Bool[Array, "batch block entries"]:
    """What is above the lowest score, and as many equal to it as there is room for."""
    above, tied = ordered > lowest, ordered == lowest
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (prefix_sums(tied, axis=-1) <= room))


def _ordered(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def listed(
    marks: Bool[Array, "batch block entries"], count: int
) -> Int[Array, "batch block count"]:
    """Indices of the marked entries of each row, of at most `count`, then -1.

    The n-th mark lies in the word of 32 marks before which there are at most n of them;
    within it, a search by halves counts bits. No sorting and no scattering.
    """
    words = _words(marks)
    ends = _prefix_sums_of_words(lax.population_count(words).astype(jnp.int32))
    shape = (*ends.shape[:-1], count)
    n = lax.broadcasted_iota(jnp.int32, shape, ends.ndim - 1)
    is_before = ends[..., None, :] <= n[..., None]
    word = jnp.sum(is_before, axis=-1, dtype=jnp.int32)
    exists = word < words.shape[-1]
    word = jnp.minimum(word, words.shape[-1] - 1)
    bits = jnp.take_along_axis(words, word, axis=-1)
    inside = n - (
        jnp.take_along_axis(ends, word, axis=-1)
        - lax.population_count(bits).astype(jnp.int32)
    )
    place = jnp.zeros_like(word)
    for width in (16, 8, 4, 2, 1):
        low = (bits >> place.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        in_upper = inside >= below
        inside = jnp.where(in_upper, inside - below, inside)
        place = jnp.where(in_upper, place + width, place)
    return jnp.where(exists, word * _WORD + place, -1)


def _words(marks: Bool[Array, "*rows entries"]) -> UInt32[Array, "*rows words"]:
    """Marks as bits, the first one lowest."""
    short = -marks.shape[-1] % _WORD
    marks = jnp.pad(marks, [(0, 0)] * (marks.ndim - 1) + [(0, short)])
    marks = marks.reshape(*marks.shape[:-1], -1, _WORD).astype(jnp.uint32)
    places = lax.broadcasted_iota(jnp.uint32, marks.shape, marks.ndim - 1)
    return jnp.sum(marks << places, axis=-1, dtype=jnp.uint32)


def _prefix_sums(marks: Bool[Array, "*rows entries"], axis: int = -1) -> Array:
    """Marks up to and with each one, along the last dimension, by two products."""
    length = marks.shape[-1]
    short = -length % _WORD
    padded = jnp.pad(marks, [(0, 0)] * (marks.ndim - 1) + [(0, short)])
    padded = padded.reshape(*marks.shape[:-1], -1, _WORD).astype(jnp.bfloat16)
    up_to = jnp.triu(jnp.ones((_WORD, _WORD), jnp.bfloat16))
    # Exact: ones and zeros, added up in float32.
    inside = jnp.einsum(
        "...wi,ij->...wj", padded, up_to, preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    ends = _prefix_sums_of_words(inside[..., -1])
    sums = inside + (ends - inside[..., -1])[..., None]
    return sums.reshape(*marks.shape[:-1], -1)[..., :length]


def _prefix_sums_of_words(counts: Int[Array, "*rows words"]) -> Array:
    """Counts up to and with each word."""
    num_words = counts.shape[-1]
    up_to = jnp.triu(jnp.ones((num_words, num_words), jnp.bfloat16))
    # A word has at most 32 marks, which bfloat16 holds exactly.
    sums = jnp.einsum(
        "...i,ij->...j",
        counts.astype(jnp.bfloat16),
        up_to,
        preferred_element_type=jnp.float32,
    )
    return sums.astype(jnp.int32)
