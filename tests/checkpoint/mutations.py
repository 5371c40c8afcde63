"""Checkpoints damaged at random: each loads as what it was, or is refused.

Mostly headers, which say where everything is; also configuration, index and data. A
mutation's number is the seed of all that is random in it, so one can be repeated.
"""

import copy
import json
import pathlib
import random
import sys
import tempfile
import warnings

import jax

from dsv4_eqx import from_pretrained
from dsv4_eqx.checkpoint.faults import FaultyCheckpoint
from tests.checkpoint.hostile import (
    CONFIG,
    INDEX,
    SHARDS,
    SINGLE,
    intact,
    with_header,
    write,
)
from tests.checkpoint.watched import nothing_outside, without_hanging

STRANGE = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 64, 128, 2**31 - 1, 2**31, 2**63, 10**300),
    *(0.0, -0.0, 1.0, 0.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "a", "../a", "/etc/passwd", "\0", "\ud800", "BF16", "F8_E4M3", "I8", "U8"),
    *([], {}, [0, 0], [[]], [None], {"a": 1}, [1] * 100, "moe", "yarn", SHARDS[0]),
)
TOKENS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"0", b"-1", b"1e9", b"\\u0000")


def mutated_bytes(chance, raw):
    """Some bytes of it changed, lost, added or moved."""
    raw = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        first = chance.randrange(len(raw) + 1)
        last = min(len(raw), first + chance.choice((1, 1, 2, 8, 100)))
        other = chance.randrange(len(raw) + 1)
        match chance.randrange(9):
            case 0 if first < len(raw):
                raw[first] ^= 1 << chance.randrange(8)
            case 1 if first < len(raw):
                raw[first] = chance.randrange(256)
            case 2:
                del raw[first:last]
            case 3:
                raw[first:first] = chance.randbytes(last - first)
            case 4:
                raw[other:other] = raw[first:last]
            case 5:
                raw[first:last] = bytes(last - first)
            case 6:
                del raw[first:]
            case 7:
                raw[first : first + 1] = chance.choice(TOKENS)
            case 8:
                raw[first:last] = raw[other : other + last - first]
    return bytes(raw)


def mutated_digits(chance, raw):
    """A digit or letter in another's place: JSON stays JSON, mostly."""
    places = [i for i, byte in enumerate(raw) if chr(byte).isalnum()]
    raw = bytearray(raw)
    for place in chance.sample(places, min(len(places), chance.choice((1, 1, 2)))):
        same = b"0123456789" if chr(raw[place]).isdigit() else b"abcwxEFU"
        raw[place] = chance.choice(same)
    return bytes(raw)


def mutated_json(chance, content):
    """Values replaced, taken away, renamed, or in each other's place."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(containers(content))
        holder, key = chance.choice(places)
        other, its_key = chance.choice(places)
        match chance.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(chance.choice(STRANGE))
            case 2:
                del holder[key]
            case 3:
                holder[key] = copy.deepcopy(other[its_key])
            case 4:
                values = copy.deepcopy((holder[key], other[its_key]))
                other[its_key], holder[key] = values
            case 5 if isinstance(holder, dict):
                holder[chance.choice((key + "x", key[:-1], "a"))] = holder.pop(key)
        if not list(containers(content)):
            break
    return content


def containers(content):
    """Every list or object inside, with each of its keys."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from containers(content[key])


def mutated_text(chance, raw):
    """JSON, changed as bytes or as what it says."""
    kind = chance.randrange(4)
    if kind < 2:
        return (mutated_bytes, mutated_digits)[kind](chance, raw)
    changed = mutated_json(chance, json.loads(raw))
    return json.dumps(changed, separators=(",", ":")).encode()


def mutated_weights(chance, raw):
    """A safetensors file: its header in most cases, its data, its length or its end."""
    end = 8 + int.from_bytes(raw[:8], "little")
    part = chance.randrange(10)
    if part < 7:
        return with_header(mutated_text(chance, raw[8:end]), raw[end:])
    if part == 7:
        return mutated_bytes(chance, raw[:16]) + raw[16:]
    if part == 8:
        return raw[:end] + mutated_bytes(chance, raw[end:])
    place = chance.randrange(end, len(raw))  # of a byte of the data
    return raw[:place] + chance.randbytes(1) + raw[place + 1 :]


def mutation(number, form):
    """The name of a file and the bytes that it becomes."""
    chance = random.Random(f"{form} {number}")
    files = intact(form)
    weights = [name for name in files if name not in (CONFIG, INDEX)]
    name = chance.choice((CONFIG, INDEX if INDEX in files else SINGLE, *[None] * 5))
    name = name or chance.choice(weights)
    is_text = name in (CONFIG, INDEX)
    return name, (mutated_text if is_text else mutated_weights)(chance, files[name])


def shapes(model):
    """Path and shape of every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]


def check_mutations(directory, form, numbers):
    """How many load; fails if one of them does anything but load or be refused."""
    write(directory, intact(form))
    expected = {
        keep: shapes(from_pretrained(directory, keep_quantized=keep))
        for keep in (False, True)
    }
    loaded = 0
    for number in numbers:
        name, raw = mutation(number, form)
        (directory / name).write_bytes(raw)
        keep = number % 2 == 0
        try:
            with (
                nothing_outside(directory),
                without_hanging(),
                warnings.catch_warnings(),
            ):
                # An optional key of another name is said in a warning.
                warnings.filterwarnings("ignore", "Config.from_hf: keys that are not")
                try:
                    model = from_pretrained(directory, keep_quantized=keep)
                except ValueError as error:
                    assert type(error) in (ValueError, FaultyCheckpoint)
                    assert str(directory) in str(error)
                    continue
            assert shapes(model) == expected[keep]
            loaded += 1
        except BaseException as error:
            error.add_note(f"mutation {number} of {form}, in {name}: {raw[:200]}")
            raise
        finally:
            (directory / name).write_bytes(intact(form)[name])
    from_pretrained(directory)  # nothing is left of them
    return loaded


def main(form, first, last):
    """Some of the mutations, in a process without the type checker of the tests."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "checkpoint"
        loaded = check_mutations(path, form, range(int(first), int(last)))
    print(f"{loaded} loaded")


if __name__ == "__main__":
    main(*sys.argv[1:])
