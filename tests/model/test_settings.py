"""JAX's settings that a user may have, and what others compile a model for."""

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.checkpoint.saving import small_model
from tests.models import forward_once, random_tokens


@pytest.mark.parametrize("shape", ["rows, 9", "2, seq"])
def test_symbolic_sizes_are_refused(shape):
    model = small_model()
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.int32)
    with pytest.raises(ValueError, match="symbolic shape .* export one for each"):
        jax.export.export(jax.jit(lambda tokens: model(tokens)))(tokens)


def test_what_explicit_axes_split_is_refused_and_may_be_called_with_auto_axes():
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    model, tokens = small_model(), random_tokens(0, 7, config=small_model().config)
    expected = forward_once(model, tokens)
    with jax.set_mesh(mesh):
        whole = jax.device_put(model, NamedSharding(mesh, P()))
        assert jax.eval_shape(forward_once, whole, tokens).shape == expected.shape
        rows = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        columns = NamedSharding(mesh, P(None, "model"))
        split = eqx.tree_at(
            lambda model: model.embedding,
            whole,
            jax.device_put(whole.embedding, columns),
        )
        for method in (whole, jax.jit(lambda tokens: whole(tokens)), whole.hidden):
            with pytest.raises(
                ValueError, match="tokens is split over data, .*auto_ax"
            ):
                method(rows)
        with pytest.raises(ValueError, match="model.embedding is split over model, "):
            split(tokens)
        logits = jax.sharding.auto_axes(forward_once, out_sharding=P("data"))(
            split, rows
        )
    assert logits.sharding.spec == P("data", None, None)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
