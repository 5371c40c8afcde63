"""Modules of a user's own over a mesh: what they say is summed, and nothing else."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import HASH_MOE, SLIDING, TOPK_MOE
from dsv4_eqx.model.parts import make_moe
from dsv4_eqx.sharding.parallelize import parallelize
from dsv4_eqx.sharding.rules import rules_with
from dsv4_eqx.sharding.tensor import SummedOver, WithAllTokens
from tests.models import QUICKLY
from tests.sharded import (
    BATCH,
    CONFIG,
    assert_equal_gradients,
    make_mesh,
    normal,
    random_module,
    random_token_ids,
)
from tests.tiers import tiers

SEQ, DIM, EXPERTS = 12, CONFIG.hidden_size, CONFIG.n_routed_experts
DIMENSIONS = {"own_heads": "tensor", "own_width": None, "lora_rank": None}


def counts(positions):
    """Tokens up to each position."""
    return (1 + positions).astype(jnp.float32)


class SumAttention(eqx.Module):
    """Each head averages all tokens so far: it needs those of other devices."""

    partial_over = ("own_heads",)
    down: Float[Array, "own_heads head_dim dim"]
    up: Float[Array, "dim own_heads head_dim"]

    def __call__(self, x, positions):
        heads = jnp.tanh(jnp.einsum("bsd,hed->bshe", x, self.down))
        mean = jnp.cumsum(heads, axis=1) / counts(positions)[..., None, None]
        return jnp.einsum("bshe,dhe->bsd", mean, self.up)


class MeanAttention(eqx.Module):
    """Nothing of it is split, and it says nothing."""

    weight: Float[Array, "own_width dim"]

    def __call__(self, x, positions):
        mean = jnp.cumsum(x, axis=1) / counts(positions)[..., None]
        return jnp.tanh(mean @ self.weight.T) @ self.weight


class OneExpert(eqx.Module):
    """In the place of the experts, with its whole output on every device."""

    weight: Float[Array, "own_width dim"]

    def __call__(self, x, chosen, weights):
        scale = jnp.sum(weights * counts(chosen), axis=1, keepdims=True)
        return jnp.tanh(x @ self.weight.T) @ self.weight * scale


class SplitExpert(eqx.Module):
    """The same where each device has some inner channels."""

    partial_over = ("own_heads",)
    weight: Float[Array, "own_heads dim"]

    def __call__(self, x, chosen, weights):
        return OneExpert(self.weight)(x, chosen, weights)


class LoraShared(eqx.Module):
    """The shared expert and a low-rank product beside it, which is not split."""

    shared: dsv4.SharedExpert
    down: Float[Array, "lora_rank dim"]
    up: Float[Array, "dim lora_rank"]

    def __call__(self, x):
        return self.shared(x) + x @ self.down.T @ self.up.T


class ScaledExperts(eqx.Module):
    """The experts, and a vector of each beside them: split as they are."""

    experts: dsv4.Experts
    shift: Float[Array, "experts dim"]

    @property
    def num_local(self):
        return len(self.shift)

    def __call__(self, x, chosen, weights):
        shifts = self.shift.at[chosen].get(mode="fill", fill_value=0)
        shifts = jnp.einsum("ts,tsd->td", weights, shifts)
        return self.experts(x, chosen, weights) + x * shifts


class OwnNorm(eqx.Module):
    """In the place of a norm; it says nothing."""

    weight: Float[Array, " dim"]

    def __call__(self, x):
        return x * self.weight


@functools.cache
def block(*names):
    """A block of which some parts are of the user's own."""
    made = random_module(dsv4.Block, 0)
    parts = {
        "SumAttention": lambda: (
            "attention",
            SumAttention(normal((4, 6, DIM), 1), normal((DIM, 4, 6), 2) / DIM),
        ),
        "MeanAttention": lambda: ("attention", MeanAttention(normal((5, DIM), 3))),
        "OneExpert": lambda: ("moe.experts", OneExpert(normal((5, DIM), 4))),
        "SplitExpert": lambda: ("moe.experts", SplitExpert(normal((8, DIM), 5))),
        "ScaledExperts": lambda: (
            "moe.experts",
            ScaledExperts(made.moe.experts, normal((EXPERTS, DIM), 6)),
        ),
        "LoraShared": lambda: (
            "moe.shared",
            LoraShared(made.moe.shared, normal((3, DIM), 7), normal((DIM, 3), 8)),
        ),
        "OwnNorm": lambda: ("moe_norm", OwnNorm(normal((DIM,), 9))),
    }
    for name in names:
        path, part = parts[name]()

        def at(block, path=path):
            return functools.reduce(getattr, path.split("."), block)

        made = eqx.tree_at(at, made, part)
    return made


def with_gradients(call, module, *args):
    """The output, and the gradients of its product with what is random."""
    shape = args[0].shape

    def loss(module, x):
        out = call(module, x, *args[1:])
        return jnp.sum(out * normal(shape, 10)), out

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    run = jax.jit(grad, compiler_options=QUICKLY)
    grads, out = run(module, args[0])
    return out, grads


def over(module, mesh, sequence):
    """What calls the module over a mesh whose axes split rows and sequences."""
    specs = dsv4.partition_specs(module, used_rules(module), mesh=mesh)
    axes = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
    spec = P(axes or None, sequence or None)
    wrap = functools.partial(parallelize, dimensions=DIMENSIONS)

    def run(module, x, token_ids, positions):
        return wrap(module, mesh, sequence)(x, token_ids, positions)

    return jax.shard_map(
        run, mesh=mesh, in_specs=(specs, spec, spec, spec), out_specs=spec
    )


def used_rules(module):
    """Rules for the dimensions that the module has."""
    leaves = dsv4.sharding.annotations.annotated_leaves(module)
    dims = {dim for leaf in leaves for dim in leaf.dims}
    rules = rules_with("test", DIMENSIONS)
    return {dim: axis for dim, axis in rules.items() if dim in dims}


OWN = [
    (("SumAttention", "OneExpert"), dict(context=2, tensor=2), True),
    (("SumAttention", "SplitExpert", "LoraShared"), dict(tensor=4), False),
]
OF_THE_WHOLE_MODEL_TOO = [
    (("MeanAttention", "ScaledExperts", "LoraShared"), dict(expert=2, tensor=2), splits)
    for splits in (True, False)
]
BLOCKS = tiers([*OWN, *OF_THE_WHOLE_MODEL_TOO], quick=OWN)


@pytest.mark.parametrize("names, sizes, splits_tokens", BLOCKS, ids=str)
def test_a_block_with_own_parts_equals_itself_on_one_device(
    names, sizes, splits_tokens
):
    mesh, module = make_mesh(**sizes), block(*names)
    able = tuple(axis for axis in ("context", "tensor") if axis in sizes)
    x = normal((BATCH, SEQ, CONFIG.hc_mult, DIM), 11)
    positions = jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ))
    args = x, random_token_ids(SEQ), positions
    over_mesh = over(module, mesh, able if splits_tokens else ())
    out, grads = with_gradients(over_mesh, module, *args)
    wanted, wanted_grads = with_gradients(
        lambda module, *args: module(*args), module, *args
    )
    np.testing.assert_allclose(out, wanted, 2e-5, 2e-5 * np.abs(wanted).max())
    assert_equal_gradients(grads, wanted_grads, 1e-4)


def test_a_whole_output_is_not_summed():
    class Ones(eqx.Module):
        def __call__(self, x, chosen, weights):
            return jnp.ones_like(x)

    moe = random_module(make_moe, HASH_MOE)
    moe = eqx.tree_at(lambda moe: moe.experts, moe, Ones())
    moe = eqx.tree_at(lambda moe: moe.shared.down, moe, replace_fn=jnp.zeros_like)
    mesh = make_mesh(tensor=2)
    run = jax.shard_map(
        lambda moe, *args: parallelize(moe, mesh)(*args),
        mesh=mesh,
        in_specs=(dsv4.partition_specs(moe, mesh=mesh), P(), P()),
        out_specs=P(),
    )
    x = normal((2, SEQ, DIM), 1)
    np.testing.assert_array_equal(run(moe, x, random_token_ids(SEQ)[:2]), 1.0)


def test_a_mixture_is_summed_once_where_both_parts_of_it_are_partial():
    mesh = make_mesh(tensor=2)

    def wrapped(*names, sequence=()):
        whole = parallelize(block(*names), mesh, sequence, dimensions=DIMENSIONS)
        return whole.moe

    for names in ((), ("SplitExpert",)):
        assert isinstance(wrapped(*names), SummedOver)
        assert isinstance(wrapped(*names).module.shared, dsv4.SharedExpert)
        by_token = wrapped(*names, sequence=("tensor",))
        assert isinstance(by_token, WithAllTokens) and by_token.summed == ("tensor",)
    one = wrapped("OneExpert")
    assert isinstance(one, dsv4.MoE) and isinstance(one.shared, SummedOver)
    assert isinstance(one.experts, OneExpert)
    lora = wrapped("LoraShared")
    assert isinstance(lora.experts, SummedOver)
    assert isinstance(lora.shared.shared, SummedOver)


@functools.cache
def small_model():
    """Two equal layers of which some parts are of the user's own."""
    config = dataclasses.replace(
        CONFIG,
        num_hidden_layers=2,
        layer_types=(SLIDING,) * 2,
        compress_ratios=(0, 0),
        mlp_layer_types=(TOPK_MOE,) * 2,
        num_nextn_predict_layers=0,
        hc_sinkhorn_iters=2,
    )
    model = random_module(lambda _, key: dsv4.DeepSeekV4(config, key=key))
    moe = model.layers.repeated[0].moe
    down, up = normal((2, 3, DIM), 1) / DIM, normal((2, DIM, 3), 2)

    def replaced(model):
        block = model.layers.repeated[0]
        return block.moe.shared, block.moe.experts, block.attention

    parts = (
        LoraShared(moe.shared, down, up),
        ScaledExperts(moe.experts, normal((2, EXPERTS, DIM), 6)),
        MeanAttention(normal((2, 5, DIM), 3)),
    )
    return eqx.tree_at(replaced, model, parts)


OF_THE_MODEL = {"lora_rank": None, "own_width": None}


def test_a_model_with_dimensions_of_its_own_is_sharded():
    model, mesh = small_model(), make_mesh(data=2, expert=2, tensor=2)
    tokens = random_token_ids(SEQ)
    sharded = dsv4.shard(model, mesh, dimensions=OF_THE_MODEL)
    assert sharded.specs.layers.repeated[0].moe.shared.up == P(None, None, None)
    sharded = dsv4.shard(model, mesh, dimensions=OF_THE_MODEL, fsdp=True)
    assert sharded.specs.layers.repeated[0].moe.shared.up == P(None, "data", None)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(model, tokens):
        def loss(model):
            logits = model(tokens)
            return jnp.sum(logits * normal(logits.shape, 5)), logits

        return jax.grad(loss, has_aux=True, allow_int=True)(model)

    (wanted_grads, wanted), (grads, found) = step(model, tokens), step(sharded, tokens)
    np.testing.assert_allclose(found, wanted, 0, 2e-5 * np.abs(wanted).max())
    # The head's are rounding: the last layer's streams are nearly parallel.
    assert_equal_gradients(grads.model.layers, wanted_grads.layers, 1e-4)
    # So many tokens `tensor` does not split.
    odd = jax.jit(lambda model: model(tokens[:, 1:]), compiler_options=QUICKLY)
    wanted = odd(model)
    np.testing.assert_allclose(odd(sharded), wanted, 0, 2e-5 * np.abs(wanted).max())


def undeclared(part):
    """The part in a class that says nothing."""
    fields = {field.name: field.type for field in dataclasses.fields(part)}
    kind = type(part)
    methods = {"__call__": kind.__call__, "__annotations__": fields}
    silent = type(eqx.Module)("Silent", (eqx.Module,), methods)
    return silent(*(getattr(part, name) for name in fields))


def with_attention(**parts):
    attention = block().attention
    for name, part in parts.items():
        attention = eqx.tree_at(lambda a: getattr(a, name), attention, part)
    return eqx.tree_at(lambda b: b.attention, block(), attention)


REFUSED = [
    (
        lambda: eqx.tree_at(
            lambda b: b.attention, block(), undeclared(block("SumAttention").attention)
        ),
        r"^attention: Silent has arrays that are split along 'own_heads'.*"
        r"`partial_over = \('own_heads',\)` .* or `partial_over = \(\)`",
    ),
    (
        lambda: eqx.tree_at(
            lambda b: b.moe.experts,
            block(),
            undeclared(block("SplitExpert").moe.experts),
        ),
        r"^moe\.experts: Silent has arrays",
    ),
    (
        lambda: with_attention(query_norm=OwnNorm(normal((DIM,), 1))),
        r"^attention\.query_norm: OwnNorm is inside of Attention, .*`partial_over = ",
    ),
    (
        lambda: block("OwnNorm"),
        r"^moe_norm: OwnNorm would be called with some tokens .*split over tensor",
    ),
]


@pytest.mark.parametrize("make, text", REFUSED)
def test_a_split_part_that_says_nothing_is_refused(make, text):
    mesh = make_mesh(tensor=2)
    with pytest.raises(ValueError, match=text):
        parallelize(make(), mesh, ("tensor",), dimensions=DIMENSIONS)
    assert parallelize(make(), make_mesh(data=2), dimensions=DIMENSIONS) is not None


def test_split_experts_must_tell_their_number():
    experts = undeclared(block("ScaledExperts").moe.experts)
    module = eqx.tree_at(lambda b: b.moe.experts, block(), experts)
    with pytest.raises(ValueError, match=r"^moe\.experts: Silent .*`num_local`"):
        parallelize(module, make_mesh(expert=2))


@pytest.mark.parametrize(
    "said, text",
    [
        ("own_heads", r"OwnNorm\.partial_over is 'own_heads': must be a tuple"),
        (("own_head",), r"OwnNorm\.partial_over names 'own_head', .*\['dim'\]"),
    ],
)
def test_what_is_said_must_be_dimensions_of_the_part(said, text, monkeypatch):
    monkeypatch.setattr(OwnNorm, "partial_over", said, raising=False)
    with pytest.raises(ValueError, match=text):
        parallelize(block("OwnNorm"), make_mesh(tensor=2))


def test_a_part_that_says_its_output_is_whole_is_taken(monkeypatch):
    monkeypatch.setattr(OwnNorm, "partial_over", (), raising=False)
    for module in (
        block("OwnNorm"),
        with_attention(query_norm=block("OwnNorm").moe_norm),
    ):
        parallelize(module, make_mesh(tensor=2), ("tensor",))


@pytest.mark.parametrize(
    "dimensions, text",
    [
        (3, r"shard\(dimensions=3\): must be a mapping like"),
        ({"lora_rank": "data"}, r"'lora_rank' is to be split over 'data'; it can"),
        ({3: None}, "the dimension 3"),
        ({"heads": None}, r"'heads' is one of dsv4_eqx\.DIMENSIONS"),
        (
            {"lora_rank": None, "lora_rnk": None},
            "rule for 'lora_rnk', which is",
        ),
        ({"own_width": None}, r"shared\.down has the dimension 'lora_rank'.*shard\("),
    ],
)
def test_dimensions_that_are_none_are_refused(dimensions, text, without_shape_checks):
    with pytest.raises(ValueError, match=text):
        dsv4.shard(small_model(), make_mesh(data=2), dimensions=dimensions)


def test_a_model_changed_after_it_was_sharded_is_refused():
    model = dsv4.shard(small_model(), make_mesh(data=2), dimensions=OF_THE_MODEL)
    plain = small_model().layers.repeated[0].moe.shared.shared
    model = eqx.tree_at(lambda m: m.model.layers.repeated[0].moe.shared, model, plain)
    with pytest.raises(ValueError, match="change the model first"):
        model(random_token_ids(SEQ))
