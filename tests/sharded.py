"""Modules over a mesh and on one device, their gradients, and how to compare them."""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import place
from tests.models import QUICKLY

# Layers 0, 1, 2 are sliding, HCA and CSA, the first two hashed, the third by score.
CONFIG = dsv4.Config.tiny()
BATCH = 8
SEQ = 69  # more than a block of queries; 17 CSA entries for an index_topk of 8
EXPERTS = CONFIG.n_routed_experts


class Case(NamedTuple):
    """A module and what it is called with."""

    module: Any
    x: Any
    token_ids: Any
    cotangent: Any


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


def random_token_ids(seq=SEQ):
    ids = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (BATCH, seq))
    return jnp.asarray(ids.astype(np.int32))


def random_module(make, *args, **kwargs):
    """The module with random arrays of a size that matters everywhere."""
    key = jax.random.key(0)
    module = eqx.filter_eval_shape(make, CONFIG, *args, key=key, **kwargs)
    generator = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(generator.integers(0, EXPERTS, leaf.shape), jnp.int32)
        value = generator.normal(size=leaf.shape)
        # Biases, norms and sinks near 1, what adds up channels smaller.
        fan_in = leaf.shape[-1] if leaf.ndim > 1 else 1
        return jnp.asarray(value / np.sqrt(fan_in), leaf.dtype)

    return jax.tree.map(fill, module)


def call(module, x, token_ids):
    """A block or a mixture of experts, over whole sequences."""
    if isinstance(module, dsv4.Block):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return module(x, token_ids, positions)
    return module(x, token_ids)


def with_gradients(call, case):
    """The output, and the gradients of its product with the cotangent."""

    def loss(module, x):
        out = call(module, x, case.token_ids)
        return jnp.sum(out.astype(jnp.float32) * case.cotangent), out

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    grads, out = grad(case.module, case.x)
    return out, *grads


run_plain = jax.jit(functools.partial(with_gradients, call), compiler_options=QUICKLY)


def make_mesh(**sizes):
    """A mesh of as many devices as it needs."""
    devices = jax.devices()[: math.prod(sizes.values())]
    return dsv4.make_mesh(**sizes, devices=devices)


class Parallel:
    """A case's program over a mesh; other cases of the same shapes may be run too."""

    def __init__(self, case, mesh):
        self.mesh = mesh
        specs = dsv4.partition_specs(parallelize(case.module, mesh), mesh=mesh)
        axes = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
        rows = P(axes or None)
        self.specs = Case(specs, rows, rows, rows)
        over_mesh = jax.shard_map(
            call, mesh=mesh, in_specs=self.specs[:3], out_specs=rows
        )
        step = jax.jit(
            functools.partial(with_gradients, over_mesh), compiler_options=QUICKLY
        )
        self.compiled = step.lower(self.placed(case)).compile()

    def placed(self, case):
        parallel = case._replace(module=parallelize(case.module, self.mesh))
        return place(parallel, self.specs, self.mesh)

    def __call__(self, case):
        return self.compiled(self.placed(case))

    def sent(self):
        """What kinds of collectives run, over which axes."""
        found = collectives(self.compiled, self.mesh)
        return {(item.kind, item.axes) for item in found}


def assert_equal_gradients(found, expected, limit, floor=0.0):
    """Every relative L2 error is within the limit; relative to no less than `floor`."""
    wanted = jax.tree_util.tree_leaves_with_path(expected)
    for (path, other), gradient in zip(wanted, jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(other.dtype, jnp.floating):
            other, gradient = np.asarray(other, "f8"), np.asarray(gradient, "f8")
            allowed = limit * max(np.linalg.norm(other), floor)
            name = jax.tree_util.keystr(path)
            assert np.linalg.norm(gradient - other) <= allowed, name


def assert_equal_to_plain(program, case):
    """A mixture equals itself on one device to within float32's rounding."""
    out, *grads = program(case)
    expected_out, *expected_grads = run_plain(case)
    np.testing.assert_allclose(out, expected_out, 1e-6, 1e-6)
    # Where all slots have one expert, the router's gradient is zero but for rounding.
    floor = float(jnp.linalg.norm(expected_grads[1]))
    assert_equal_gradients(grads, expected_grads, 1e-6, floor)


def assert_same_bits(found, expected):
    """Equal arrays of the same dtypes, to the last bit."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
