"""The whole model over a mesh against itself on one device."""

import collections
import dataclasses
import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.mesh import AXES
from tests.models import compilations, quick_jit
from tests.sharded import (
    BATCH,
    assert_equal_gradients,
    assert_same_bits,
    make_mesh,
    normal,
    random_module,
)
from tests.tiers import tiers

# A layer that hashes, one that scores, and a prediction block, whose attention slides:
# every kind, in three blocks to compile. A mesh does not change how often the streams'
# mixing is balanced, and each time is compiled on its own.
CONFIG = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=2,
    layer_types=(HCA, CSA),
    compress_ratios=(8, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE),
    hc_sinkhorn_iters=2,
)
TWO_KINDS = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
# The layer that has everything, twice in a loop: one block to compile.
ONE_KIND = dataclasses.replace(
    TWO_KINDS,
    layer_types=(CSA, CSA),
    compress_ratios=(4, 4),
    mlp_layer_types=(TOPK_MOE, TOPK_MOE),
)
# The same once, without a loop, whose collected values take long to compile.
LAYER = dataclasses.replace(
    ONE_KIND,
    num_hidden_layers=1,
    layer_types=(CSA,),
    compress_ratios=(4,),
    mlp_layer_types=(TOPK_MOE,),
)
# What takes least to compile.
SLIDING_LAYER = dataclasses.replace(LAYER, layer_types=(SLIDING,), compress_ratios=(0,))
SEQ = 48  # 12 entries for an index_topk of 8; over 8 devices, 6 tokens between windows


@functools.cache
def plain(config=CONFIG, dtype=jnp.float32):
    return random_module(lambda _, key: dsv4.DeepSeekV4(config, dtype=dtype, key=key))


def tokens(seq=SEQ, batch=BATCH):
    ids = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (batch, seq))
    return jnp.asarray(ids.astype(np.int32))


def loss(model, tokens):
    """Linear in all logits, so that no gradient is small, and the logits."""
    outputs = model.multi_token_logits(tokens) if model.num_mtp else (model(tokens),)
    total = sum(jnp.sum(x * normal(x.shape, 5 + i)) for i, x in enumerate(outputs))
    # The last layer's streams are nearly parallel: the norm after the head hides how it
    # weighs them, and its gradient is rounding. Here are some that are not.
    streams = normal((*tokens.shape, CONFIG.hc_mult, CONFIG.hidden_size), 7)
    total += jnp.sum(
        model.collapse(streams) * normal(streams.shape[:-2] + streams.shape[-1:], 8)
    )
    return total, outputs


step = quick_jit(jax.grad(loss, has_aux=True, allow_int=True))


@functools.cache
def expected(config):
    return step(plain(config), tokens())


def name_of(value):
    if isinstance(value, dsv4.Config):
        return f"{value.num_hidden_layers + value.num_nextn_predict_layers}-blocks"
    return "-".join(f"{axis}{size}" for axis, size in value.items())


QUICK = [(ONE_KIND, dict(data=2, context=2, tensor=2, fsdp=True))]
# Every axis on its own, and with others.
IN_CI = [
    (CONFIG, dict(expert=2, context=2, tensor=2)),
    *((LAYER, {axis: 8}) for axis in AXES[1:]),
]
MORE = [
    (LAYER, dict(data=8, fsdp=True)),
    *((config, dict(data=2, expert=2, tensor=2)) for config in (CONFIG, ONE_KIND)),
    # In CI, packed rows are split over it.
    (CONFIG, dict(data=2, expert=2, context=2, fsdp=True)),
    *((ONE_KIND, {axis: 2}) for axis in AXES),
]
MESHES = tiers([*QUICK, *IN_CI, *MORE], quick=QUICK, in_ci=IN_CI)


def over(sizes, config=CONFIG):
    sizes = dict(sizes)
    fsdp = sizes.pop("fsdp", False)
    return dsv4.shard(plain(config), make_mesh(**sizes), fsdp=fsdp)


@pytest.mark.parametrize("config, sizes", MESHES, ids=name_of)
def test_logits_and_gradients_equal_those_of_one_device(config, sizes):
    model = over(sizes, config)
    compiled = step.lower(model, tokens()).compile()
    grads, logits = compiled(model, tokens())
    expected_grads, expected_logits = expected(config)
    for found, wanted in zip(logits, expected_logits, strict=True):
        np.testing.assert_allclose(found, wanted, 0, 2e-5 * np.abs(wanted).max())
    assert_equal_gradients(grads.model, expected_grads, 1e-4)
    assert_same_bits(compiled(model, tokens()), (grads, logits))
    # Gradients lie where their weights do, if there are any: not in the indexer.
    for grad, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(model), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and np.any(grad):
            assert grad.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    used = {axis for item in collectives(compiled, model.mesh) for axis in item.axes}
    assert used == {axis for axis in AXES if sizes.get(axis, 1) > 1}


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_on_one_device():
    exact, (exact_logits,) = expected(ONE_KIND)
    narrow = plain(ONE_KIND, jnp.bfloat16)
    mesh = make_mesh(expert=2, tensor=2)

    def errors(model):
        grads, (logits,) = step(model, tokens())
        grads = grads.model if isinstance(grads, dsv4.ShardedModel) else grads
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True)
        for a, b in [(logits, exact_logits), *pairs]:
            # The error of a few numbers is a matter of luck.
            if b.size >= 64 and jnp.issubdtype(b.dtype, jnp.inexact) and np.any(b):
                a, b = np.asarray(a, "f8"), np.asarray(b, "f8")
                yield np.linalg.norm(a - b) / np.linalg.norm(b)

    sharded, single = errors(dsv4.shard(narrow, mesh)), errors(narrow)
    for error, allowed in zip(sharded, single, strict=True):
        assert error <= 1.1 * allowed < 0.1


FEW = [
    (dict(tensor=8), 33),  # heads do not divide them: all are on all devices
    # Windows that are on several devices each, some of them on none's end.
    (dict(context=8), 24),
    (dict(context=2, tensor=4), 72),
]
FEWER = [
    (dict(tensor=8), 6),
    (dict(context=8), 8),
    (dict(context=8), 56),
    (dict(context=2, tensor=4), 16),
]


@pytest.mark.parametrize("sizes, seq", tiers([*FEW, *FEWER], in_ci=FEW))
def test_few_tokens_on_each_device(sizes, seq):
    ids, model = tokens(seq), over(sizes, TWO_KINDS)
    call = quick_jit(lambda model, ids: model(ids))
    wanted = call(plain(TWO_KINDS), ids)
    np.testing.assert_allclose(call(model, ids), wanted, 0, 2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("has_gradients", tiers([False, True], in_ci=[False]))
def test_the_real_rates_windows_and_choices(has_gradients):
    """More entries than are selected, and windows within and across devices."""
    config = dataclasses.replace(
        TWO_KINDS, compress_ratios=(128, 4), sliding_window=128, index_topk=512
    )
    model = random_module(lambda _, key: dsv4.DeepSeekV4(config, key=key))
    ids = tokens(2304, 1)

    sharded = dsv4.shard(model, make_mesh(context=4, tensor=2))

    def loss(model):
        logits = model(ids, remat=has_gradients)
        return jnp.sum(logits * normal(logits.shape, 5)), logits

    step = jax.grad(loss, has_aux=True, allow_int=True) if has_gradients else loss
    wanted_grads, wanted = quick_jit(step)(model)
    found_grads, found = quick_jit(step)(sharded)
    np.testing.assert_allclose(found, wanted, 0, 2e-5 * np.abs(wanted).max())
    if has_gradients:
        # The head's are rounding: the last layer's streams are nearly parallel.
        found_grads, wanted_grads = found_grads.model.layers, wanted_grads.layers
        assert_equal_gradients(found_grads, wanted_grads, 1e-4)


DECODING = [
    (dict(data=2, tensor=2, fsdp=True), True),
    (dict(data=2, context=2, tensor=2, fsdp=True), False),
    (dict(expert=2, tensor=4), True),
]


@pytest.mark.parametrize("sizes, speculative", tiers(DECODING, in_ci=DECODING[:1]))
def test_generated_tokens_equal_those_of_one_device(sizes, speculative):
    ids, lengths = tokens(21), np.array([21, 3, 17, 8, 1, 20, 9, 4], np.int32)
    generate = functools.partial(
        dsv4.generate, tokens=ids, lengths=lengths, max_new_tokens=4
    )
    config = dataclasses.replace(ONE_KIND, num_nextn_predict_layers=1)
    model = over(sizes, config)
    # Drafts change neither tokens nor probabilities, on one device as elsewhere.
    wanted = generate(plain(config), speculative=True)
    found = generate(model, speculative=speculative)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(
        found.num_accepted, wanted.num_accepted if speculative else 0
    )
    np.testing.assert_allclose(
        found.log_probabilities, wanted.log_probabilities, 0, 2e-5
    )


@pytest.mark.slow
def test_extending_gives_the_same_hidden_activations():
    model, ids = over(dict(expert=2, tensor=2), TWO_KINDS), tokens(13)
    lengths = np.array([13, 0, 7, 1, 13, 2, 3, 12], np.int32)
    extend = quick_jit(lambda model, *args: model.extend(*args))
    wanted, found = (
        extend(one, ids, one.init_cache(BATCH, 20), lengths)
        for one in (plain(TWO_KINDS), model)
    )
    for state in jax.tree.leaves(found[1]):
        assert state.sharding.shard_shape(state.shape)[0] == BATCH // 2
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            found[0][row, :length], wanted[0][row, :length], 0, 2e-5
        )
    np.testing.assert_array_equal(found[1].lengths, lengths)


@pytest.mark.slow
def test_calls_outside_of_jit_compile_nothing_the_second_time_and_keep_no_weights():
    ids = tokens(5)

    def calls(model):
        hidden = model.hidden(ids)
        nats = model.cross_entropy(hidden, ids)
        new, cache = model.extend(ids, model.init_cache(BATCH, 16))
        return hidden, nats, new, cache.lengths

    model = dsv4.shard(plain(LAYER), make_mesh(data=2, tensor=2))
    wanted = calls(model)
    model = jax.tree.map(jnp.copy, model)
    with compilations() as compiled:
        found = calls(model)
    assert len(compiled) == 0
    assert_same_bits(found, wanted)
    np.testing.assert_allclose(found[0], plain(LAYER).hidden(ids), 0, 2e-5)
    weight = weakref.ref(model.model.embedding)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("split_vocab", [True, False])
def test_a_loss_without_whole_logits_equals_the_plain_one(split_vocab):
    mesh = make_mesh(data=2, context=2, tensor=2)
    model = dsv4.shard(plain(), mesh, split_vocab=split_vocab)
    hidden, targets = normal((BATCH, SEQ, CONFIG.hidden_size), 8), tokens()
    nats = quick_jit(lambda model, *args: model.cross_entropy(*args))
    wanted = nats(plain(), hidden, targets)
    lowered = nats.lower(model, hidden, targets)
    np.testing.assert_allclose(nats(model, hidden, targets), wanted, 0, 2e-5)
    logits = jax.nn.log_softmax(plain().unembed(hidden))
    by_hand = -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(wanted, by_hand, 1e-5, 1e-5)
    a_device = BATCH * SEQ // 4 * 4  # bytes of a number for each token
    sent = [item.num_bytes for item in collectives(lowered.compile(), mesh)]
    assert max(sent, default=0) <= a_device * CONFIG.hidden_size
    assert (sent == []) == (not split_vocab)
    mask = np.asarray(targets) % 3 > 0
    ignored = np.where(mask, targets, -100)
    found = nats(model, hidden, ignored, mask)
    np.testing.assert_allclose(found, np.where(mask, wanted, 0), 0, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fsdp", [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_three_steps_of_an_optimizer_give_the_same_weights(fsdp):
    optax = pytest.importorskip("optax")
    mesh = make_mesh(data=2, expert=2)
    # An epsilon above rounding: before the first layer all streams are equal, so that
    # the gradient of how they mix is 0, and Adam would make a step of its rounding.
    optimizer = optax.adam(1e-2, eps=1e-6)

    @quick_jit
    def train(model, state):
        floats, others = eqx.partition(model, eqx.is_inexact_array)

        def mean_nats(floats):
            model = eqx.combine(floats, others)
            hidden = model.hidden(tokens(), remat=True)
            return jnp.mean(model.cross_entropy(hidden, jnp.roll(tokens(), -1, 1)))

        grads = jax.grad(mean_nats)(floats)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state

    def after_three(model):
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(3):
            model, state = train(model, state)
        return model, state

    before = plain(SLIDING_LAYER)
    wanted, _ = after_three(before)
    with jax.set_mesh(mesh):
        found, state = after_three(dsv4.shard(before, mesh, fsdp=fsdp))
    assert train._cache_size() == 2  # one each
    assert float(jnp.max(jnp.abs(wanted.embedding - before.embedding))) > 1e-2
    assert_equal_gradients(found.model, wanted, 1e-4)
    if fsdp:
        sizes = [x.nbytes for x in jax.tree.leaves(state)]
        held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
        assert sum(held) <= sum(sizes) / 2


def bytes_of(model):
    """Bytes of all arrays, and those that each device has."""
    held = collections.Counter()
    for leaf in jax.tree.leaves(model):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model)), held


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, expert=2, tensor=2)])
def test_every_array_lies_where_it_is_promised(sizes):
    for fsdp in (False, True):
        model = dsv4.shard(plain(), make_mesh(**sizes), fsdp=fsdp)
        leaves, structure = jax.tree.flatten(model.model)
        for leaf, spec in zip(leaves, structure.flatten_up_to(model.specs)):
            promised = NamedSharding(model.mesh, spec)
            assert leaf.sharding.is_equivalent_to(promised, leaf.ndim)
    total, held = bytes_of(model)
    tables = sum(x.nbytes for x in leaves if jnp.issubdtype(x.dtype, jnp.integer))
    # Split over data alone, all but the tables and what has few elements is split.
    if sizes == dict(data=8):
        assert max(held.values()) <= (total - tables) / 8 + tables + 0.05 * total


@pytest.mark.slow
def test_a_model_made_on_the_mesh_has_the_same_bits():
    make = jax.jit(functools.partial(dsv4.DeepSeekV4, ONE_KIND, key=jax.random.key(1)))
    mesh = make_mesh(data=2, expert=2, tensor=2)
    model = dsv4.shard(make, mesh, fsdp=True)
    assert_same_bits(model.model, dsv4.shard(make(), mesh, fsdp=True).model)
    for leaf, spec in zip(
        jax.tree.leaves(model.model),
        jax.tree.structure(model.model).flatten_up_to(model.specs),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def forward_collectives(sizes, layers):
    config = dataclasses.replace(
        TWO_KINDS,
        num_hidden_layers=len(layers),
        layer_types=layers,
        compress_ratios=tuple({SLIDING: 0, HCA: 8, CSA: 4}[kind] for kind in layers),
        mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * (len(layers) - 1),
    )
    model = over(sizes, config)
    hidden = quick_jit(lambda model, ids: model.hidden(ids))
    found = collectives(hidden.lower(model, tokens()).compile(), model.mesh)
    return collections.Counter((item.kind, item.axes) for item in found)


SENT = [
    (dict(data=8), (HCA, CSA), {}),
    pytest.param(dict(data=1), (HCA, CSA), {}, marks=pytest.mark.exhaustive),
    # Rows and weights there, results back, and how many of each; the same once more for
    # further rounds, which may not run.
    (
        dict(expert=2),
        (SLIDING, CSA),
        {("all-to-all", ("expert",)): 2 * 3 * 2, ("all-gather", ("expert",)): 2},
    ),
    # Window and leftovers in one message; entries where there are some.
    (
        dict(context=2),
        (SLIDING, HCA, CSA),
        {("collective-permute", ("context",)): 3, ("all-gather", ("context",)): 2},
    ),
    (
        dict(tensor=2),
        (SLIDING, HCA, CSA),
        {
            # Embedding, attention, experts.
            ("reduce-scatter", ("tensor",)): 1 + 3 + 3,
            # Ids (for embedding and hash, merged), latents and keys, entries,
            # selection, activations for experts.
            ("all-gather", ("tensor",)): 1 + 3 + 2 + 1 + 3,
            ("collective-permute", ("tensor",)): 2,
        },
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, layers, sent", SENT)
def test_forward_passes_send_what_is_planned(sizes, layers, sent):
    assert forward_collectives(sizes, layers) == sent


REFUSED = [
    (lambda m: m(tokens(46)), r"46 tokens do not divide over context=4"),
    (lambda m: m(tokens(batch=7)), r"batch of shape \(7, 48\).*data=2"),
    (lambda m: m.init_cache(3, 5), r"init_cache.*multiple of 2 rows"),
    (lambda m: m.init_cache("x", 5), r"init_cache\(batch='x'\)"),
    (lambda m: m.init_mtp_cache(2, 0), r"init_mtp_cache\(capacity=0\)"),
    (lambda m: m(tokens()[0]), r"\(batch, seq\)"),
    (lambda m: dsv4.generate(m, tokens(5, 3), max_new_tokens=2), r"multiple of 2 rows"),
]


@pytest.mark.parametrize("call, text", REFUSED)
def test_what_does_not_divide_is_refused(call, text, without_shape_checks):
    with pytest.raises(ValueError, match=text):
        call(over(dict(data=2, context=4)))


NO_MODELS = [
    ((3,), {}, r"shard\(model='int'\): must be a DeepSeekV4"),
    ((lambda: 3,), {}, r"shard\(model='int'\)"),
    ((lambda: over(dict(data=2)),), {}, r"shard\(model='ShardedModel'\)"),
    ((plain,), dict(split_vocab=None), r"shard\(split_vocab=None\)"),
    ((plain,), dict(fsdp="no"), r"shard\(fsdp='no'\)"),
]


@pytest.mark.parametrize("arguments, options, text", NO_MODELS)
def test_what_makes_no_model_is_refused(arguments, options, text, without_shape_checks):
    with pytest.raises(ValueError, match=text):
        dsv4.shard(*arguments, make_mesh(data=2), **options)


def test_meshes_that_cannot_hold_the_model_are_refused():
    explicit = jax.make_mesh((1, 1, 1, 8), AXES)
    text = (
        r"axis_types are Explicit .* dsv4_eqx\.make_mesh, .*\(.*AxisType\.Auto,\) \* 4"
    )
    with pytest.raises(ValueError, match=text):
        dsv4.shard(plain(), explicit)
    sizes, kinds = (1, 1, 2, 4), (AxisType.Auto,) * 4
    with pytest.raises(ValueError, match="an abstract mesh holds no numbers"):
        dsv4.shard(plain(), AbstractMesh(sizes, AXES, axis_types=kinds))


def test_a_token_alone_and_no_token_at_all():
    mesh = make_mesh(data=2, context=2, tensor=2)
    model = dsv4.shard(plain(), mesh)
    hidden = normal((CONFIG.hidden_size,), 8)
    np.testing.assert_allclose(model.unembed(hidden), plain().unembed(hidden), 1e-5)
    ours, wanted = (one.cross_entropy(hidden, jnp.int32(3)) for one in (model, plain()))
    np.testing.assert_allclose(ours, wanted, 1e-5)
    hidden = normal((BATCH, SEQ, CONFIG.hidden_size), 8)
    for one in (plain(), model):
        nats = quick_jit(lambda model, *args: model.cross_entropy(*args))
        found = nats(one, hidden, tokens().at[2, 3].set(-100).at[0, 1].set(9999))
        assert np.argwhere(np.isnan(found)).tolist() == [[0, 1], [2, 3]]
        with pytest.raises(ValueError, match=r"target 9999 at \[0, 1\]"):
            one.cross_entropy(hidden, tokens().at[0, 1].set(9999))
