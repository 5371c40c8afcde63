"""What devices that split a sequence get from each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_eqx.sharding.gather import gather, sum_and_split
from dsv4_eqx.sharding.tokens import with_tokens_before
from tests.sharded import make_mesh, normal

BATCH = 3


def over(sizes, function, *arrays, out_specs=None):
    axes = tuple(sizes)
    spec = P(None, axes)
    run = jax.shard_map(
        functools.partial(function, axes=axes),
        mesh=make_mesh(**sizes),
        in_specs=(spec,) * len(arrays),
        out_specs=spec if out_specs is None else out_specs,
    )
    return jax.jit(run)(*arrays)


@pytest.mark.parametrize(
    "sizes", [dict(context=8), dict(context=2, tensor=4), dict(tensor=2)]
)
@pytest.mark.parametrize("local, counts", [(5, (3, 5)), (2, (7, 0)), (1, (11, 4))])
def test_tokens_come_after_those_of_the_devices_before(sizes, local, counts):
    devices = int(np.prod(list(sizes.values())))
    wide = normal((BATCH, devices * local, 2, 3), 1)
    narrow = normal((BATCH, devices * local, 5), 2).astype(jnp.bfloat16)

    def run(wide, narrow, axes):
        return tuple(with_tokens_before([wide, narrow], counts, axes))

    found = over(sizes, run, wide, narrow)
    for got, whole, count in zip(found, (wide, narrow), counts, strict=True):
        assert got.dtype == whole.dtype
        zeros = np.zeros_like(whole, shape=(BATCH, count, *whole.shape[2:]))
        padded = np.concatenate([zeros, whole], axis=1)
        starts = range(0, devices * local, local)
        wanted = [padded[:, i : i + count + local] for i in starts]
        np.testing.assert_array_equal(got, np.concatenate(wanted, axis=1))


def test_tokens_are_gathered_in_order_and_sums_split_again():
    sizes, x = dict(context=2, tensor=4), normal((BATCH, 24, 5), 3)

    def gather_and_split(x, axes):
        whole = gather(x, axes, dim=1)
        parts = gather(x, "tensor", dim=1)
        return whole, sum_and_split(parts, "tensor", dim=1)

    whole, summed = over(sizes, gather_and_split, x)
    for copy in np.split(np.asarray(whole), 8, axis=1):
        np.testing.assert_array_equal(copy, x)
    np.testing.assert_allclose(summed, 4 * np.asarray(x), 1e-6)


def test_the_devices_before_get_the_gradients_of_what_they_gave():
    sizes, x, weight = dict(context=4), normal((BATCH, 12, 2), 4), normal((3,), 5)

    def run(x, axes):
        (joined,) = with_tokens_before([x], [1], axes)
        return weight[0] * joined[:, 1:] + weight[1] * joined[:, :-1]

    def plain(x):
        shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return weight[0] * x + weight[1] * shifted

    def gradient(function):
        return jax.grad(lambda x: jnp.sum(function(x) ** 2))(x)

    found = gradient(lambda x: over(sizes, run, x))
    np.testing.assert_allclose(found, gradient(plain), 1e-5, 1e-6)
