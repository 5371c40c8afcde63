"""Collectives read off small programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv4_eqx import make_mesh
from dsv4_eqx.plan.collectives import Collective, collectives

MESH = make_mesh(data=2, expert=2, tensor=2)
ROWS, CHANNELS = 8, 3  # on each device; float32
BYTES = ROWS * CHANNELS * 4


def compiled(function, mesh=MESH):
    """The function on an array that all devices have, each returning its own."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    return jax.jit(mapped).lower(jnp.ones((ROWS, CHANNELS))).compile()


def permute(axis, pairs):
    return lambda x: lax.ppermute(x, axis, pairs)


PROGRAMS = {
    "all-reduce over one axis": (
        lambda x: lax.psum(x, "expert"),
        Collective("all-reduce", ("expert",), BYTES),
    ),
    "all-reduce over two axes": (
        lambda x: lax.psum(x, ("data", "tensor")),
        Collective("all-reduce", ("data", "tensor"), BYTES),
    ),
    "all-reduce over all axes": (
        lambda x: lax.psum(x, ("data", "expert", "tensor")),
        Collective("all-reduce", ("data", "expert", "tensor"), BYTES),
    ),
    "all-reduce of two arrays": (
        lambda x: lax.psum((x, x[0]), "tensor"),
        Collective("all-reduce", ("tensor",), BYTES + CHANNELS * 4),
    ),
    "all-gather": (
        lambda x: lax.all_gather(x, "data"),
        Collective("all-gather", ("data",), 2 * BYTES),
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "tensor", 0, 0, tiled=True),
        Collective("all-to-all", ("tensor",), BYTES),
    ),
    "all-to-all of bytes over two axes": (
        lambda x: lax.all_to_all(
            x.astype(jnp.int8), ("data", "expert"), 0, 0, tiled=True
        ),
        Collective("all-to-all", ("data", "expert"), BYTES // 4),
    ),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, ("expert", "tensor"), tiled=True),
        Collective("reduce-scatter", ("expert", "tensor"), BYTES // 4),
    ),
    "collective-permute in a ring": (
        permute("expert", [(0, 1), (1, 0)]),
        Collective("collective-permute", ("expert",), BYTES),
    ),
    "collective-permute of some": (
        permute("data", [(1, 0)]),
        Collective("collective-permute", ("data",), BYTES),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_collective_has_its_kind_axes_and_bytes(name):
    function, expected = PROGRAMS[name]
    program = compiled(function)
    found = collectives(program, MESH)
    # Two arrays may go in one instruction or in two.
    assert {(item.kind, item.axes) for item in found} == {expected[:2]}
    assert sum(item.num_bytes for item in found) == expected.num_bytes
    assert collectives(program.as_text(), MESH) == found


def test_a_collective_in_a_loop_counts_once():
    def step(_, x):
        return lax.psum(jnp.sin(x), "tensor")

    def function(x):
        return lax.fori_loop(0, 5, step, lax.all_gather(x, "data", tiled=True))

    found = collectives(compiled(function), MESH)
    assert sorted(found) == [
        Collective("all-gather", ("data",), 2 * BYTES),
        Collective("all-reduce", ("tensor",), 2 * BYTES),
    ]


def test_a_single_device_sends_nothing():
    program = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jnp.ones((3, 5))).compile()
    assert collectives(program, make_mesh(devices=jax.devices()[:1])) == []


# As other backends and versions of XLA write them.
WRITTEN = {
    "f32[6]{0:T(8)} all-reduce(%x), replica_groups={}, to_apply=%add": (
        "all-reduce",
        ("data", "expert", "tensor"),
        24,
    ),
    "(f32[2,3]{1,0}, pred[5]) all-reduce(%x, %y), replica_groups=[4,2]<=[8]": (
        "all-reduce",
        ("tensor",),
        29,
    ),
    "bf16[7]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}": (
        "all-gather",
        ("data",),
        14,
    ),
    "bf16[7]{0} all-gather(%x), replica_groups=[2,4]<=[2,2,2], dimensions={0}": (
        "all-gather",
        ("expert", "tensor"),
        14,
    ),
    "bf16[7]{0} all-gather(%x), replica_groups=[2,4]<=[2,2,2]T(1,0,2)": (
        "all-gather",
        ("data", "tensor"),
        14,
    ),
    "(f32[3]{0}, f32[6]{0}) all-gather-start(%x), replica_groups={{0,2},{1,3}}": (
        "all-gather",
        ("expert",),
        24,
    ),
    "((f32[3], s8[1]), (f32[6], s8[2])) all-gather-start(%x, %y), "
    "replica_groups={{0,2},{1,3}}": ("all-gather", ("expert",), 26),
    "(f32[3], s8[1]) all-reduce-start(%x, %y), replica_groups={{0,1}}": (
        "all-reduce",
        ("tensor",),
        13,
    ),
    "f32[2] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}": (
        "all-reduce",
        (),
        8,
    ),
    "(f32[3], f32[3], u32[], u32[]) collective-permute-start(%x), "
    "source_target_pairs={{0,4},{4,0}}": ("collective-permute", ("data",), 12),
    "f32[5]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] "
    "{'axis_0'}, to_apply=%add": ("all-reduce", ("data",), 20),
    "f32[5]{0} all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], "
    "device_ids=([2,2,2]T(0,2,1)) {'axis_0'}": (
        "all-reduce",
        ("data", "tensor"),
        20,
    ),
    "f32[5]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}": (
        "all-reduce",
        ("data", "expert"),
        20,
    ),
    "f8e4m3fn[5] ragged-all-to-all(%x), replica_groups={{0,1}}": (
        "ragged-all-to-all",
        ("tensor",),
        5,
    ),
}


@pytest.mark.parametrize("line", WRITTEN)
def test_other_ways_of_writing_a_collective_are_read(line):
    found = collectives(f"HloModule m\n  %c.1 = {line}, channel_id=1\n", MESH)
    assert found == [Collective(*WRITTEN[line])]


def test_the_end_of_a_collective_and_its_uses_do_not_count():
    text = """
      %done = f32[6] all-gather-done(%all-gather-start)
      %part = f32[2]{0} get-tuple-element(%all-to-all), index=0
      ROOT %add = f32[2] add(%part, %all-reduce.3), metadata={op_name="all-reduce(x)"}
    """
    assert collectives(text, MESH) == []


def test_groups_in_an_unknown_form_are_refused():
    line = "%c = f32[6] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(1)2}"
    with pytest.raises(ValueError, match="which devices take part in .*mesh"):
        collectives(line, MESH)
