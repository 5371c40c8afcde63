"""Experts over a mesh: whatever the routing, no token is lost."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import HASH_MOE, TOPK_MOE
from dsv4_eqx.model.parts import make_moe
from dsv4_eqx.sharding import parallelize
from tests.sharded import (
    BATCH,
    CONFIG,
    EXPERTS,
    Case,
    Parallel,
    assert_equal_to_plain,
    make_mesh,
    normal,
    random_module,
    random_token_ids,
    run_plain,
)
from tests.tiers import tiers

SEQ = 5  # an odd number of tokens for each device


@functools.cache
def moe_case(kind, dtype=jnp.float32):
    shape = (BATCH, SEQ, CONFIG.hidden_size)
    x, ids = normal(shape, 1).astype(dtype), random_token_ids(SEQ)
    moe = random_module(make_moe, kind, dtype=dtype)
    return Case(moe, x, ids, normal(shape, 2))


moe_program = functools.cache(
    lambda expert, tensor, dtype=jnp.float32: Parallel(
        moe_case(HASH_MOE, dtype), make_mesh(expert=expert, tensor=tensor)
    )
)


def routed_by(table, dtype=jnp.float32):
    """A mixture whose tokens go where the table says."""
    case = moe_case(HASH_MOE, dtype)
    table = np.broadcast_to(table, (CONFIG.vocab_size, CONFIG.num_experts_per_tok))
    table = jnp.asarray(table.astype(np.int32))
    return case._replace(
        module=eqx.tree_at(lambda moe: moe.router.table, case.module, table)
    )


def random_table(experts):
    shape = (CONFIG.vocab_size, CONFIG.num_experts_per_tok)
    return np.random.default_rng(4).choice(experts, shape)


ROUTINGS = {
    "all to the first": 0,
    "all to the last": EXPERTS - 1,
    "all to one in the middle": 5,
    "all to three of one device": [2, 0, 1],
    "all to three far apart": [15, 7, 0],
    "one to the first device, the rest to the last": random_table([0] + [15] * 20),
    "none to odd ones": random_table(np.arange(0, EXPERTS, 2)),
    "none to the second half": random_table(np.arange(EXPERTS // 2)),
    "to all": random_table(np.arange(EXPERTS)),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "expert, tensor",
    tiers([(8, 1), (2, 1), (2, 4)], quick=[(8, 1)], in_ci=[(2, 4)]),
)
def test_no_token_is_dropped_whatever_the_routing(expert, tensor, routing):
    case = routed_by(ROUTINGS[routing])
    assert_equal_to_plain(moe_program(expert, tensor), case)


def test_each_row_gets_all_of_its_experts():
    # Without the other side of a comparison: linear in a single expert's output.
    case, program = routed_by(ROUTINGS["to all"]), moe_program(8, 1)
    silent = eqx.tree_at(
        lambda moe: (moe.experts.down, moe.shared.down),
        case.module,
        replace_fn=jnp.zeros_like,
    )
    table = np.asarray(case.module.router.table)[np.asarray(case.token_ids)]
    for expert in range(EXPERTS):
        loud = eqx.tree_at(
            lambda moe: moe.experts.down,
            silent,
            silent.experts.down.at[expert].set(case.module.experts.down[expert]),
        )
        out, *_ = program(case._replace(module=loud))
        np.testing.assert_array_equal(
            (np.asarray(out) != 0).any(axis=-1), (table == expert).any(axis=-1)
        )


@pytest.mark.slow
def test_the_exchange_keeps_bfloat16_to_the_bit():
    case = routed_by(ROUTINGS["to all"], jnp.bfloat16)
    out, *_ = moe_program(4, 1, jnp.bfloat16)(case)
    expected, *_ = run_plain(case)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.slow
def test_a_bias_may_send_all_tokens_to_few_experts():
    program = Parallel(moe_case(TOPK_MOE), make_mesh(expert=8))
    for experts in (3,), (0, 8, 15):
        case = moe_case(TOPK_MOE)
        bias = np.zeros(EXPERTS, np.float32)
        bias[list(experts)] = 50
        moe = eqx.tree_at(lambda moe: moe.router.bias, case.module, jnp.asarray(bias))
        assert_equal_to_plain(program, case._replace(module=moe))


def ragged_by_hand(operand, output, starts, sent, places, received, *, axis_name):
    """What JAX documents of `ragged_all_to_all`, which XLA has not for CPUs."""
    me = lax.axis_index(axis_name)
    operands, starts, sent, places = (
        lax.all_gather(x, axis_name) for x in (operand, starts, sent, places)
    )
    for source in range(len(sent)):
        row = jnp.arange(len(output)) - places[source, me]
        is_new = (row >= 0) & (row < received[source])
        new = operands[source][jnp.where(is_new, row + starts[source, me], 0)]
        new = jnp.where(sent[source, me] == received[source], new, jnp.nan)
        is_new = is_new.reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(is_new, new.astype(output.dtype), output)
    return output


@pytest.mark.parametrize(
    "expert, tensor", tiers([(4, 2), (8, 1), (2, 2)], quick=[(4, 2)])
)
def test_a_ragged_exchange_brings_the_same(expert, tensor, monkeypatch):
    monkeypatch.setattr(parallelize, "_has_ragged_exchange", lambda mesh: True)
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_by_hand)
    program = Parallel(moe_case(HASH_MOE), make_mesh(expert=expert, tensor=tensor))
    assert ("all-to-all", ("expert",)) not in program.sent()
    for routing in ("all to the last", "all to three of one device", "to all"):
        assert_equal_to_plain(program, routed_by(ROUTINGS[routing]))


def test_a_ragged_exchange_and_its_gradient_are_programs_for_accelerators(monkeypatch):
    assert not parallelize._has_ragged_exchange(make_mesh(expert=2))
    monkeypatch.setattr(parallelize, "_has_ragged_exchange", lambda mesh: True)
    case, mesh = moe_case(HASH_MOE), make_mesh(expert=2)
    moe = parallelize.parallelize(case.module, mesh)
    rows, specs = P("expert"), dsv4.partition_specs(moe, mesh=mesh)

    def loss(moe, x, ids):
        call = jax.shard_map(
            lambda moe, x, ids: moe(x, ids),
            mesh=mesh,
            in_specs=(specs, rows, rows),
            out_specs=rows,
        )
        return jnp.sum(call(moe, x, ids))

    step = jax.jit(jax.grad(loss, allow_int=True))
    traced = step.trace(moe, case.x, case.token_ids)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # Rows and weights there and results back, and again in the backward pass.
        assert text.count("@ragged_all_to_all") >= 6
