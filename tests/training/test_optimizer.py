"""The optimizer against Algorithm 1 in numpy, torch's AdamW, and itself over a mesh."""

import dataclasses
import functools
import math
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from dsv4_eqx.model.model import abstract_model
from dsv4_eqx.plan.collectives import collectives
from dsv4_eqx.sharding.rules import place
from dsv4_eqx.training.roles import Kind, leaf_roles
from tests.models import QUICKLY, relative, small_config
from tests.sharded import assert_same_bits, make_mesh

optax = pytest.importorskip("optax")

# One layer first, then a pair of layers twice: every kind, and stacks of two.
CONFIG = small_config(
    num_hidden_layers=5,
    layer_types=(SLIDING, HCA, CSA, HCA, CSA),
    compress_ratios=(0, 16, 4, 16, 4),
    mlp_layer_types=(HASH_MOE,) + (TOPK_MOE,) * 4,
)
RATE, MOMENTUM, DECAY, GAMMA = 0.02, 0.9, 0.3, 0.18


@functools.cache
def trained():
    model = abstract_model(CONFIG, jnp.float32)
    return random_like(eqx.filter(model, dsv4.trainable(model)), 9, scale=0.1)


def random_like(tree, seed, scale=1.0):
    """Numbers of the tree's shapes and dtypes; hardly two arrays have the same size."""
    generator = np.random.default_rng(seed)

    def draw(x):
        size = scale * generator.uniform(0.01, 1)
        return jnp.asarray((size * generator.standard_normal(x.shape)).astype(x.dtype))

    return jax.tree.map(draw, tree)


def stepper(transformation):
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(weights, state, gradients):
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    return step


def run(transformation, weights, all_gradients):
    """The weights after some steps."""
    state = jax.jit(transformation.init, compiler_options=QUICKLY)(weights)
    step = stepper(transformation)
    for gradients in all_gradients:
        weights, state = step(weights, state, gradients)
    return weights


def newton_schulz(x):
    """Algorithm 1's rule for one matrix."""
    x = x / np.linalg.norm(x)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def algorithm_1(weight, gradients):
    """One matrix after some steps, in float64."""
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = MOMENTUM * momentum + gradient
        direction = newton_schulz(MOMENTUM * momentum + gradient)
        update = direction * math.sqrt(max(weight.shape)) * GAMMA
        weight = weight * (1 - RATE * DECAY) - RATE * update
    return weight


def adamw(weight, gradients, decay):
    """torch's, which decouples the decay."""
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(np.array(weight)))
    optimizer = torch.optim.AdamW(
        [parameter], RATE, betas=(0.9, 0.95), eps=1e-20, weight_decay=decay
    )
    for gradient in gradients:
        parameter.grad = torch.tensor(np.array(gradient))
        optimizer.step()
    return parameter.detach().numpy()


@functools.cache
def three_steps():
    """Every array's role, its gradients, and it before and after three steps."""
    numbers = dict(momentum=MOMENTUM, weight_decay=DECAY, gamma=GAMMA, clip=None)
    transformation = dsv4.optimizer(trained(), RATE, **numbers)
    gradients = [random_like(trained(), seed) for seed in range(3)]
    after = run(transformation, trained(), gradients)
    columns = map(jax.tree.leaves, (*gradients, trained(), after))
    return list(zip(leaf_roles("test", trained()), *columns, strict=True))


def test_each_matrix_steps_as_algorithm_1_says_for_it_alone():
    kinds = []
    for role, *gradients, before, after in three_steps():
        if role.kind != Kind.MUON:
            continue
        matrices = [
            np.asarray(x, "f8").reshape(role.matrices)
            for x in (*gradients, before, after)
        ]
        for *gradients, before, after in zip(*matrices, strict=True):
            expected = algorithm_1(before, gradients)
            error = relative(after - before, expected - before)
            assert error < 1e-5, (role.name, error)
        kinds.append(len(role.shape) - role.num_separate)
    assert len(kinds) > 40 and set(kinds) == {2, 3}


def test_other_arrays_step_as_torchs_adamw():
    decayed = 0
    for role, *gradients, before, after in three_steps():
        if role.kind != Kind.MUON:
            decay = DECAY if role.kind == Kind.DECAYED else 0.0
            expected = adamw(before, gradients, decay)
            np.testing.assert_allclose(after, expected, 1e-6, 1e-7, err_msg=role.name)
            decayed += decay > 0
    assert decayed == 2


def test_largest_norm_is_of_all_gradients_together():
    part = dsv4.SharedExpert(12, 9, key=jax.random.key(0)), dsv4.RMSNorm(7)
    gradients = [random_like(part, seed, scale=50.0) for seed in range(2)]
    leaves = [jax.tree.leaves(tree) for tree in gradients]
    norms = [math.sqrt(sum(float((x**2).sum()) for x in tree)) for tree in leaves]
    assert min(norms) > 2 * 3.0 and norms[0] != pytest.approx(norms[1], rel=0.1)
    shrunk = [
        jax.tree.map(lambda x, norm=norm: x * (3.0 / norm), tree)
        for tree, norm in zip(gradients, norms)
    ]
    clipped = run(dsv4.optimizer(part, RATE, clip=3.0), part, gradients)
    expected = run(dsv4.optimizer(part, RATE, clip=None), part, shrunk)
    unclipped = run(dsv4.optimizer(part, RATE, clip=None), part, gradients)
    for x, y, other in zip(*map(jax.tree.leaves, (clipped, expected, unclipped))):
        np.testing.assert_allclose(x, y, 1e-5, 1e-6)
        assert relative(x, other) > 1e-4


def test_rate_may_be_a_function_of_the_step():
    part = dsv4.SharedExpert(12, 9, key=jax.random.key(0))
    gradients = [random_like(part, seed) for seed in range(3)]
    warm = dsv4.schedule(0.2, 0.0, 2, 0, 0)  # 0, 0.1, 0.2
    after = run(dsv4.optimizer(part, warm), part, gradients[:1])
    assert_same_bits(after, part)
    after = run(dsv4.optimizer(part, warm), part, gradients)
    assert relative(after.down, part.down) > 0.1


def test_gradients_of_several_batches_are_averaged():
    part = dsv4.SharedExpert(12, 9, key=jax.random.key(0)), dsv4.RMSNorm(7)
    gradients = [random_like(part, seed) for seed in range(4)]
    pairs = zip(gradients[::2], gradients[1::2])
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *pair) for pair in pairs]
    transformation = dsv4.optimizer(part, RATE)
    with jax.numpy_dtype_promotion("standard"):  # optax's MultiSteps needs it
        several = optax.MultiSteps(transformation, 2)
        found = run(several, part, gradients)
    for x, y in zip(*map(jax.tree.leaves, (found, run(transformation, part, means)))):
        np.testing.assert_allclose(x, y, 1e-5, 1e-6)


def test_state_is_float32_and_updates_have_the_weights_dtype():
    part = dsv4.SharedExpert(12, 9, key=jax.random.key(0), dtype=jnp.bfloat16)
    transformation = dsv4.optimizer(part, RATE)
    state = transformation.init(part)
    updates, after = transformation.update(random_like(part, 0), state, part)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
    for before, x in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert before.dtype == x.dtype and x.dtype.name in ("float32", "int32")


def test_abstract_weights_have_an_abstract_state():
    model = abstract_model(dsv4.Config.flash(), jnp.float32)
    weights = eqx.filter(model, dsv4.trainable(model))
    transformation = dsv4.optimizer(weights, RATE)
    state = jax.eval_shape(transformation.init, weights)
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    held = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    # Muon keeps one number for each, AdamW two; embeddings are most of the latter.
    assert size + 1.0e9 < held < size + 1.1e9


SMALL = dataclasses.replace(
    dsv4.Config.tiny(),
    num_hidden_layers=2,
    layer_types=(CSA, CSA),
    compress_ratios=(4, 4),
    mlp_layer_types=(TOPK_MOE, TOPK_MOE),
    num_nextn_predict_layers=0,
)


def test_step_over_a_mesh_is_that_on_one_device():
    mesh = make_mesh(data=2, expert=2, tensor=2)
    model = abstract_model(SMALL, jnp.float32)
    model = dsv4.shard(model, mesh, fsdp=True)
    shapes = eqx.filter(model, dsv4.trainable(model))
    before, gradients = random_like(shapes, 0, scale=0.1), random_like(shapes, 1)

    def put(x, weight):
        return jax.device_put(x, weight.sharding)

    weights, placed = (jax.tree.map(put, tree, shapes) for tree in (before, gradients))
    transformation = dsv4.optimizer(shapes, RATE)
    state = transformation.init(weights)
    assert_has_the_weights_shardings(transformation, state, weights)
    step = stepper(transformation)
    after, state = step(weights, state, placed)
    assert_has_the_weights_shardings(transformation, state, weights)
    step(after, state, placed)
    assert step._cache_size() == 1  # results lie where they are wanted
    expected = run(transformation, before, [gradients])
    trees = after, expected, before, weights
    for x, y, old, weight in zip(*map(jax.tree.leaves, trees), strict=True):
        assert x.sharding.is_equivalent_to(weight.sharding, x.ndim)
        assert len(x.sharding.device_set) == 8 and len(y.sharding.device_set) == 1
        assert relative(np.asarray(x) - old, np.asarray(y) - old) < 1e-5


def assert_has_the_weights_shardings(transformation, state, weights):
    """Optax's own way to what in the state belongs to a weight."""
    found = []

    def compare(x, weight):
        if not isinstance(x, optax.MaskedNode):
            assert x.sharding.is_equivalent_to(weight.sharding, weight.ndim)
            found.append(x)

    optax.tree_map_params(
        transformation,
        compare,
        state,
        weights,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert len(found) > len(jax.tree.leaves(weights))


def test_experts_of_stacked_layers_step_where_they_are():
    mesh = make_mesh(expert=4)
    experts = dsv4.Experts(12, 9, 8, key=jax.random.key(0))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), experts)
    weights = place(stacked, dsv4.partition_specs(stacked, mesh=mesh), mesh)
    transformation = dsv4.optimizer(weights, RATE)
    arguments = weights, transformation.init(weights), weights
    sent = collectives(stepper(transformation).lower(*arguments).compile(), mesh)
    # The squares of the two arrays' gradients, summed for the norm.
    assert [(item.kind, item.num_bytes) for item in sent] == [("all-reduce", 8)]


def test_own_transformations_train_their_arrays():
    part = {"a": dsv4.SharedExpert(12, 9, key=jax.random.key(0)), "b": jnp.ones(3)}
    gradients = random_like(part, 0)
    own = {"b": optax.sgd(0.5), "a.down": optax.set_to_zero()}
    after = run(dsv4.optimizer(part, RATE, clip=None, own=own), part, [gradients])
    np.testing.assert_allclose(after["b"], part["b"] - 0.5 * gradients["b"], 1e-6)
    assert_same_bits(after["a"].down, part["a"].down)
    assert relative(after["a"].gate_up, part["a"].gate_up) > 1e-3
    with pytest.raises(ValueError, match=r"optimizer: \['b'\] has no shape annotation"):
        dsv4.optimizer(part, RATE)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(momentum=1.0), r"momentum=1.0\): must be in \[0, 1\)"),
        (dict(adam_b2=-0.1), r"adam_b2=-0.1"),
        (dict(gamma=0), r"gamma=0\): .*above 0"),
        (dict(adam_eps=0.0), r"adam_eps=0.0\): .*above 0"),
        (dict(clip=-1.0), r"clip=-1.0\): .*above 0"),
        (dict(weight_decay=math.nan), r"weight_decay=nan"),
        (dict(schedule="cosine"), r"schedule='cosine'\): must be a learning rate"),
        (
            dict(schedule=-0.1),
            r"schedule=-0.1\): must be a learning rate of at least 0",
        ),
    ],
)
def test_wrong_numbers_are_refused(changes, message, without_shape_checks):
    arguments = dict(trained=dsv4.RMSNorm(3), schedule=RATE) | changes
    with pytest.raises(ValueError, match=rf"optimizer\({message}"):
        dsv4.optimizer(**arguments)


@pytest.mark.parametrize("name", ["optimizer", "schedule"])
def test_without_optax_its_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    calls = {
        "optimizer": lambda: dsv4.optimizer(dsv4.RMSNorm(3), RATE),
        "schedule": lambda: dsv4.schedule(1.0, 0.1, 1, 1, 1),
    }
    with pytest.raises(ImportError, match=rf"^{name} .*'dsv4-eqx\[train\]'"):
        calls[name]()
