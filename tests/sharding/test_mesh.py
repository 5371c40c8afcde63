"""The mesh: always four axes, whose sizes multiply to the devices."""

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType

from dsv4_eqx import make_mesh

REFUSED = (ValueError, jaxtyping.TypeCheckError)  # the latter under the type checker
AXES = ("data", "expert", "context", "tensor")


def test_a_mesh_has_all_four_axes_of_auto_type():
    mesh = make_mesh(data=2, expert=1, tensor=4)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == dict(data=2, expert=1, tensor=4, context=1)
    # Explicit axes break indexing and equinox's filters.
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert mesh.devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize("axis", AXES)
def test_any_axis_can_take_all_devices(axis):
    mesh = make_mesh(**{axis: 8})
    assert {name: size for name, size in mesh.shape.items() if size > 1} == {axis: 8}


def test_tensor_neighbours_are_neighbouring_devices():
    ids = np.vectorize(lambda device: device.id)(make_mesh(data=4, tensor=2).devices)
    np.testing.assert_array_equal(ids[:, 0, 0, :], np.arange(8).reshape(4, 2))


def test_a_mesh_of_some_devices():
    devices = jax.devices()[3:6]
    mesh = make_mesh(expert=3, devices=devices)
    assert mesh.size == 3 and mesh.devices.ravel().tolist() == devices
    assert make_mesh(devices=devices[:1]).size == 1


@pytest.mark.parametrize("sizes", [{}, dict(data=3), dict(data=4, tensor=4)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    product = int(np.prod(list(sizes.values()), dtype=int))
    with pytest.raises(ValueError, match=rf"needs {product} devices and there are 8"):
        make_mesh(**sizes)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_sizes_below_one_are_refused(axis, size):
    with pytest.raises(ValueError, match=rf"{axis}={size}.*at least 1"):
        make_mesh(**{axis: size})


def test_two_negative_sizes_do_not_make_a_positive_one():
    with pytest.raises(ValueError, match=r"data=-2.*at least 1"):
        make_mesh(data=-2, expert=-4)


@pytest.mark.parametrize("size", [2.0, True, "2", None])
def test_sizes_must_be_integers(size):
    with pytest.raises(REFUSED, match=r"expert=.*must be an integer|int"):
        make_mesh(expert=size)


def test_devices_must_be_different_devices():
    with pytest.raises(ValueError, match=r"devices=\[0, 1\]\): must be devices"):
        make_mesh(data=2, devices=[0, 1])
    with pytest.raises(ValueError, match="must be different devices"):
        make_mesh(data=2, devices=jax.devices()[:1] * 2)
