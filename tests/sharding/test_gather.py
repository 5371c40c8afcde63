"""Gathering and its transpose, as JAX has them and without reduce-scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding import gather as gathering
from dsv4_eqx.sharding.gather import gather, sum_and_split
from tests.sharded import assert_equal_gradients, make_mesh, normal


@pytest.mark.parametrize("axes", ["tensor", ("context", "tensor")])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_way_of_several_processes_gives_the_same(axes, dim, monkeypatch):
    mesh = make_mesh(context=2, tensor=4)
    spec = P(*[None] * dim, axes)
    x, weight = normal((8, 16, 3), 1), normal((8, 16, 3), 2)

    def run(x, weight):
        whole = gather(x, axes, dim)
        index = gather(jnp.arange(len(x)), axes, 0)
        return (
            sum_and_split(
                jnp.sin(whole * jnp.sum(index).astype(whole.dtype)), axes, dim
            )
            * weight
        )

    def program():
        over = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec)

        def loss(x):
            out = over(x, weight)
            return jnp.sum(out), out

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(x).compile()
        return compiled(x), {item.kind for item in collectives(compiled, mesh)}

    (wanted_grad, wanted), kinds = program()
    assert kinds == {"all-gather", "reduce-scatter"}
    monkeypatch.setattr(gathering, "_sums_whole", lambda: True)
    (grad, found), kinds = program()
    assert kinds == {"all-gather", "all-reduce"}
    np.testing.assert_allclose(found, wanted, 1e-6, 1e-6)
    assert_equal_gradients(grad, wanted_grad, 1e-6)


def test_one_process_uses_what_jax_has():
    assert not gathering._sums_whole()
    whole = functools.partial(gather, axes="tensor", dim=0)
    run = jax.shard_map(
        whole, mesh=make_mesh(tensor=2), in_specs=P("tensor"), out_specs=P("tensor")
    )
    np.testing.assert_array_equal(run(jnp.arange(4)), [0, 1, 2, 3] * 2)
