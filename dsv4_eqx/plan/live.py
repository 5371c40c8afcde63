"""How many bytes a traced program holds at once on a device: an estimate.

The equations are taken in the order of the program. A value lives from the equation
that makes it to the last that reads it; the program's own inputs and outputs cost
nothing here. A change of shape, a broadcast and a placement are views of what they
read, and so is a sum over devices; an elementwise operation writes over an operand that
nobody reads any more. XLA reorders and fuses, so that its own count differs.
"""

from collections.abc import Collection
from typing import Any, Final, NamedTuple

from jax.extend.core import Jaxpr, Literal

from dsv4_eqx.plan.sent import bytes_of, inner_programs

_VIEWS: Final = set(
    "broadcast_in_dim copy expand_dims iota psum psum_invariant pvary reshape reshard "
    "sharding_constraint squeeze stop_gradient transpose".split()
)
# These read operands after they began to write.
_NOT_IN_PLACE: Final = set(
    "all_gather all_to_all cumsum dot_general gather ppermute ragged_dot "
    "ragged_dot_general reduce_scatter rev sort".split()
)


class _Lives(NamedTuple):
    """Of the values of one program, views left out."""

    holder: dict[Any, Any]  # for each value the one whose bytes it shows
    num_bytes: dict[Any, int]  # on one device
    last: dict[Any, int]  # the last equation that reads it
    costless: set[Any]


def peak_bytes(program: Jaxpr) -> int:
    """The most bytes that are alive at once on one device, in a step of a program.

    What it computes outside of `jax.shard_map` is taken to be small, or split as what
    it reads.
    """
    return _peak(program, range(len(program.outvars)), whole=True)


def _peak(program: Jaxpr, free: Collection[int], *, whole: bool) -> int:
    """The peak without inputs, and without the outputs whose places are `free`.

    `whole` values, outside of `jax.shard_map`, are not those of one device.
    """
    lives = _lives_of(program, free, whole=whole)
    alive: dict[Any, int] = {}
    most = 0
    for place, equation in enumerate(program.eqns):
        made = {
            x: lives.num_bytes[x]
            for x in equation.outvars
            if lives.holder[x] is x and x not in lives.costless
        }
        before, new = sum(alive.values()), sum(made.values())
        if _writes_over(equation, alive, lives, place):
            new = 0
        most = max(most, before + _inside(equation, lives, new, whole=whole))
        alive |= made
        # What nobody reads was dropped already, or is alive for this equation alone.
        ended = [x for x in alive if lives.last.get(x, place) <= place]
        for x in ended:
            del alive[x]
    return most


def _lives_of(program: Jaxpr, free: Collection[int], *, whole: bool) -> _Lives:
    holder = {x: x for x in (*program.invars, *program.constvars)}
    num_bytes = {x: bytes_of(x) for x in holder}
    costless, last = set(holder), {}
    for place, equation in enumerate(program.eqns):
        read = [x for x in equation.invars if not isinstance(x, Literal)]
        for x in read:
            last[holder[x]] = place
        is_view = equation.primitive.name in _VIEWS
        inner = inner_programs(equation)
        for i, x in enumerate(equation.outvars):
            of = read[i if len(read) == len(equation.outvars) else 0 :]
            holder[x] = holder[of[0]] if is_view and of else x
            num_bytes.setdefault(x, bytes_of(x))
            if whole and equation.primitive.name == "shard_map":
                num_bytes[x] = bytes_of(inner[0].outvars[i])
            elif whole:
                like = [y for y in read if _shape(y) == _shape(x)]
                num_bytes[x] = num_bytes[like[0]] if like else num_bytes[x]
            if is_view and not read:  # an iota, or a scalar's broadcast
                costless.add(x)
    for i, x in enumerate(program.outvars):
        if not isinstance(x, Literal):
            last[holder[x]] = len(program.eqns)
            if i in free:
                costless.add(holder[x])
    return _Lives(holder, num_bytes, last, costless)


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x.aval, "shape", ())


def _writes_over(
    equation: Any, alive: dict[Any, int], lives: _Lives, place: int
) -> bool:
    """Whether the result takes the place of an operand."""
    if equation.primitive.name in _NOT_IN_PLACE or inner_programs(equation):
        return False
    operands = [lives.holder[x] for x in equation.invars if not isinstance(x, Literal)]
    ending = [alive[x] for x in operands if x in alive and lives.last[x] == place]
    return max(ending, default=-1) >= sum(lives.num_bytes[x] for x in equation.outvars)


def _inside(equation: Any, lives: _Lives, new: int, *, whole: bool) -> int:
    """Bytes while an equation runs, with those of its results."""
    inner, name = inner_programs(equation), equation.primitive.name
    if not inner:
        return new
    whole = whole and name != "shard_map"
    if name in ("scan", "while", "cond"):
        slices = 0
        if name == "scan":
            pairs = zip(equation.invars, inner[0].invars, strict=True)
            slices = sum(bytes_of(x) for of, x in pairs if _shape(of) != _shape(x))
        return new + slices + max(_peak(body, (), whole=whole) for body in inner)
    outs = enumerate(equation.outvars)
    free = {i for i, x in outs if lives.holder[x] in lives.costless}
    return max(new, *(_peak(body, free, whole=whole) for body in inner))
