"""Sinkhorn's rounds on Hopper GPUs: one launch, a thread for each token's matrix.

A round divides a matrix by the sums of its columns and turns it. XLA makes several
launches of every few rounds, though a round is a few operations for each token.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from dsv4_eqx.kernels.batching import one_by_one
from dsv4_eqx.numerics.varying import match_varying, shape_varying_like

# Tokens of a block: one for each thread of a warpgroup.
_TOKENS: Final = 128
_SHARED: Final = 220 * 1024  # bytes of shared memory that a block may use


def fits_sinkhorn(matrix: Array, rounds: int) -> bool:
    """Whether the sums that the backward pass keeps fit into shared memory."""
    size = matrix.shape[0]
    return matrix.dtype == jnp.float32 and rounds * size * _TOKENS * 4 <= _SHARED


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def divide_and_turn(
    matrix: Float32[Array, "size size *batch"],
    rounds: int,
    eps: float,
    interpret: Any = None,  # parameters of Pallas's interpreter, for tests
) -> Float32[Array, "size size *batch"]:
    """So many times divided by the columns' sums, plus `eps`, and turned."""
    size = matrix.shape[0]

    def body(given, out):
        block = _Block(size, given)
        block.write(out, block.run(rounds, eps))

    return _call(body, "sinkhorn", {}, interpret, matrix)


def _forward(matrix, rounds, eps, interpret):
    return divide_and_turn(matrix, rounds, eps, interpret), matrix


def _backward(rounds, eps, interpret, matrix, cotangent):
    size = matrix.shape[0]

    def body(given, d_final, d_given, sums):
        block = _Block(size, given)
        final = block.run(rounds, eps, sums)

        def undo(i, state):
            # What the round gave, before it was turned, and the gradient of that.
            turned, d_turned = state
            divided, d_divided = _transpose(turned), _transpose(d_turned)
            step = rounds - 1 - i
            total = [sums[step, column] for column in range(size)]
            before = [[x * total[j] for j, x in enumerate(row)] for row in divided]
            weighted = [
                [d * x for d, x in zip(*rows)] for rows in zip(d_divided, divided)
            ]
            along = _column_sums(weighted)
            d_before = [
                [(d - along[j]) / total[j] for j, d in enumerate(row)]
                for row in d_divided
            ]
            return before, d_before

        state = final, block.read(d_final)
        block.write(d_given, lax.fori_loop(0, rounds, undo, state)[1])

    shared = {"sums": plgpu.SMEM((rounds, size, _TOKENS), jnp.float32)}
    return (_call(body, "sinkhorn_backward", shared, interpret, matrix, cotangent),)


divide_and_turn.defvjp(_forward, _backward)


class _Block:
    """The matrices of some tokens: lists of rows, each element of all these tokens."""

    def __init__(self, size: int, given: Any):
        start = lax.axis_index("block") * _TOKENS
        self.size, self.given = size, given
        self.tokens = pl.ds(pl.multiple_of(start, _TOKENS), _TOKENS)

    def read(self, ref: Any) -> list[list[Array]]:
        places = range(self.size)
        return [[ref[i, j, self.tokens] for j in places] for i in places]

    def write(self, ref: Any, matrix: list[list[Array]]) -> None:
        for i, row in enumerate(matrix):
            for j, element in enumerate(row):
                ref[i, j, self.tokens] = element

    def run(self, rounds: int, eps: float, sums: Any = None) -> list[list[Array]]:
        """The matrices after all rounds, whose sums are written to `sums`."""

        def divide(step, matrix):
            total = [x + eps for x in _column_sums(matrix)]
            if sums is not None:
                for column, x in enumerate(total):
                    sums[step, column] = x
            return _transpose([[x / t for x, t in zip(row, total)] for row in matrix])

        return lax.fori_loop(0, rounds, divide, self.read(self.given))


def _transpose(matrix: list[list[Array]]) -> list[list[Array]]:
    return [list(column) for column in zip(*matrix)]


def _column_sums(matrix: list[list[Array]]) -> list[Array]:
    return [functools.reduce(jnp.add, column) for column in zip(*matrix)]


def _call(
    body: Callable[..., None],
    name: str,
    shared: dict[str, Any],
    interpret: Any,
    *operands: Float32[Array, "size size *batch"],
) -> Float32[Array, "size size *batch"]:
    """The kernel over all tokens, to which some are added that fill the last block."""
    size, _, *batch = operands[0].shape
    operands = match_varying(*(x.reshape(size, size, -1) for x in operands))
    num_tokens = operands[0].shape[2]
    num_blocks = -(-num_tokens // _TOKENS)
    missing = num_blocks * _TOKENS - num_tokens

    @one_by_one
    def call(*operands):
        shape = (size, size, num_blocks * _TOKENS)
        kernel = plgpu.kernel(
            body,
            out_type=shape_varying_like(shape, jnp.float32, *operands),
            scratch_types=shared,
            grid=(num_blocks,),
            grid_names=("block",),
            kernel_name=name,
            interpret=interpret,
        )
        return match_varying(kernel(*operands), *operands)[0]

    # Ones, of which no sum is 0.
    padded = (
        jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=1) for x in operands
    )
    return call(*padded)[..., :num_tokens].reshape(size, size, *batch)
