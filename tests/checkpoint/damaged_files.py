"""Damaged files, indexes and links: the damage, and what an error must say."""

import os
import pickle

from tests.checkpoint.hostile import (
    INDEX,
    SHARDS,
    SINGLE,
    as_file,
    as_json,
    both,
    edit,
    edit_entry,
    edit_json,
    link,
    put,
    remove,
    special,
    tensors_in,
    with_header,
)

FP8 = "layers.0.attn.wq_a.weight"  # in the first shard
FP4 = "layers.1.ffn.experts.3.w1.weight"  # in the second
NORM = "norm.weight"  # there too
ONE, TWO, THREE = SHARDS
MILLION = 10**6


class Code:
    """Runs a command where its pickle is opened."""

    def __reduce__(self):
        return os.system, ("touch executed",)


PICKLE = pickle.dumps(Code(), protocol=4)


def header(content, data=b""):
    """Gives the first shard another header."""
    return put(ONE, with_header(content, data))


def entry(start, end):
    """Of bytes in a header."""
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


def shard(name):
    """Says that the first tensor is in a file of this name."""
    return edit_json(INDEX, lambda index: _set_first(index, name)), INDEX


def _set_first(index, name):
    names = index["weight_map"]
    names[next(iter(names))] = name


def many(piece, times, name=ONE):
    """A list of very many of the same; made only when it is needed."""

    def damage(directory):
        raw = b"[" + piece * times + b"0]"
        put(name, raw if name == INDEX else with_header(raw))(directory)

    return damage


def map_of(number, file=None):
    """An index of that many tensors, each in a file of its own or all in one."""

    def damage(directory):
        names = {str(i): file or f"{i}.safetensors" for i in range(number)}
        put(INDEX, as_json({"weight_map": names}))(directory)

    return damage


def in_one_file(directory):
    """All shards in one, beside the index."""
    tensors = {}
    for shard in SHARDS:
        tensors |= tensors_in((directory / shard).read_bytes())
    put(SINGLE, as_file(tensors))(directory)


FILES = {
    "missing": (remove(TWO), "1 of 3 files", TWO, NORM, FP4),
    "two missing": (
        remove(ONE, THREE),
        ONE,
        THREE,
        FP8,
        "embed.weight",
        "mtp.0.norm.weight",
    ),
    "empty": (put(ONE, b""), ONE, "cut short"),
    "cut in the length": (edit(ONE, lambda raw: raw[:5]), ONE, "cut short"),
    "cut after the length": (edit(ONE, lambda raw: raw[:8]), ONE, "cut short"),
    "cut in the header": (edit(ONE, lambda raw: raw[:300]), ONE, "cut short"),
    "cut in the data": (edit(ONE, lambda raw: raw[:-4000]), ONE, "cut short"),
    "cut by a byte": (edit(ONE, lambda raw: raw[:-1]), ONE, "cut short"),
    "a byte too long": (edit(ONE, lambda raw: raw + b"0"), ONE, "more than its header"),
    "overlap": (
        header({"a": entry(0, 2), "b": entry(1, 3)}, b"abc"),
        ONE,
        "'b'",
        "overlaps",
    ),
    "gap": (header({"a": entry(0, 1), "b": entry(2, 3)}, b"abc"), ONE, "'b'", "gap"),
    "negative offsets": (edit_entry(FP8, data_offsets=[-1536, 0]), FP8, "-1536"),
    "reversed offsets": (
        edit_entry(FP8, data_offsets=[1536, 0]),
        ONE,
        FP8,
        "[1536, 0]",
    ),
    "offsets beyond": (
        edit_entry(NORM, data_offsets=[2**40, 2**40 + 128]),
        TWO,
        "a gap",
    ),
    "float offsets": (edit_entry(FP8, data_offsets=[0.0, 1536.0]), ONE, FP8, "1536.0"),
    "boolean offsets": (edit_entry(FP8, data_offsets=[False, True]), ONE, FP8, "True"),
    "huge offsets": (edit_entry(FP8, data_offsets=[10**4000, 10**4001]), ONE, FP8),
    "three offsets": (edit_entry(FP8, data_offsets=[0, 1, 2]), ONE, FP8),
    "negative shape": (edit_entry(FP8, shape=[-24, -64]), ONE, FP8, "-24"),
    "float shape": (edit_entry(FP8, shape=[24.0, 64]), ONE, FP8, "24.0"),
    "huge shape": (edit_entry(FP8, shape=[2**62, 2**62, 0]), ONE, FP8),
    "shape of a million": (edit_entry(FP8, shape=[2] * MILLION), ONE, "commas"),
    "shape of 1000": (edit_entry(FP8, shape=[2] * 1000), ONE, FP8, "shape"),
    "shape of digits": (edit_entry(FP8, shape=[10**4000] * 3000), ONE, FP8, "shape"),
    "shape a string": (edit_entry(FP8, shape="24"), ONE, FP8, "'24'"),
    "unknown dtype": (edit_entry(FP8, dtype="F6_E3M2"), ONE, FP8, "F6_E3M2"),
    "dtype a list": (edit_entry(FP8, dtype=["U8"]), ONE, FP8, "['U8']"),
    "another key": (edit_entry(FP8, stride=[1]), ONE, FP8, "stride"),
    "entry a number": (header({FP8: 3}), ONE, FP8, "3"),
    "header zero": (put(ONE, bytes(8) + b"{}"), ONE),
    "header longer than the file": (
        put(ONE, b"\xff\0\0\0\0\0\0\0{}"),
        ONE,
        "255 bytes",
    ),
    "header of 2**63": (put(ONE, b"\0" * 7 + b"\x81{}"), ONE, "bytes"),
    "header of 30 MB": (header(b" " * 30 * MILLION), ONE, "30000000 bytes"),
    "header not JSON": (header(b"{'a': 1}"), ONE, "not JSON"),
    "header a list": (header([]), ONE, "not an object"),
    "header nested": (header(b'{"a":' * 5000 + b"0" + b"}" * 5000), ONE),
    "header nested little": (header(b'{"a":' * 90 + b"0" + b"}" * 90), ONE, "'a'"),
    "header not UTF-8": (header(b'{"\xff": 0}'), ONE, "not UTF-8"),
    "header with a key twice": (header(b'{"a": 1, "a": 2}'), ONE, "'a'", "twice"),
    "header of brackets": (lambda d: header(b"[" * 20 * MILLION)(d), ONE, "brackets"),
    "header of objects": (many(b"{},", 6 * MILLION), ONE, "brackets"),
    "header of numbers": (many(b"257,", 5 * MILLION), ONE, "commas"),
    "header of strings": (many(b'"",', 7 * MILLION), ONE, "quotes"),
    "header of many tensors": (
        lambda d: header({str(i): entry(0, 0) for i in range(370_000)})(d),
        ONE,
        "far too many",
    ),
    "git LFS": (put(ONE, b"version https://git-lfs.github.com/spec/v1\n"), ONE, "LFS"),
    "HTML": (put(ONE, b"<!DOCTYPE html><html></html>"), ONE, "HTML"),
    "pickle named safetensors": (put(ONE, PICKLE), ONE, "a pickle"),
    "zip named safetensors": (put(ONE, b"PK\x03\x04" + bytes(60)), ONE, "zip"),
    "pickle only": (
        both(remove(*SHARDS, INDEX), put("pytorch_model.bin", PICKLE)),
        "pytorch_model.bin",
        "pickles",
    ),
    "a directory": (special(ONE, os.mkdir), ONE, "not a regular file"),
    "a pipe": (special(ONE, os.mkfifo), ONE, "not a regular file"),
    "a link to itself": (link(ONE, ONE), ONE, "cannot be opened"),
    "links in a loop": (both(link(ONE, TWO), link(TWO, ONE)), ONE, "cannot be opened"),
    "a link to nothing": (link(ONE, "nothing"), ONE, "cannot be opened"),
}
INDEXES = {
    "parent": (*shard("../secret.safetensors"), "'../secret.safetensors'"),
    "absolute": (*shard("/etc/secret.safetensors"), "'/etc/secret.safetensors'"),
    "backslash": (*shard("..\\secret.safetensors"), "secret.safetensors"),
    "drive": (*shard("C:\\secret.safetensors"), "secret.safetensors"),
    "NUL": (*shard("a\0.safetensors"), "x00.safetensors"),
    "empty name": (*shard(""), "''"),
    "only a suffix": (shard(".safetensors")[0], "1 of 4 files", ".safetensors"),
    "sub-folder": (*shard("sub/model.safetensors"), "'sub/model.safetensors'"),
    "long name": (*shard("a" * 300 + ".safetensors"), "aaa"),
    "half a surrogate": (*shard("\ud800.safetensors"), "ud800"),
    "new line": (*shard("a\n.safetensors"), "'a\\n.safetensors'"),
    "pickle": (*shard("pytorch_model.bin"), "'pytorch_model.bin'"),
    "number": (*shard(3), "is in 3"),
    "list": (*shard([ONE]), f"is in ['{ONE}']"),
    "null": (*shard(None), "is in None"),
    "no weight_map": (put(INDEX, b"{}"), INDEX, "weight_map"),
    "empty weight_map": (put(INDEX, b'{"weight_map": {}}'), INDEX, "weight_map"),
    "weight_map a list": (put(INDEX, b'{"weight_map": [1]}'), INDEX, "weight_map"),
    "empty": (put(INDEX, b""), INDEX, "not JSON"),
    "not JSON": (put(INDEX, b"weight_map:"), INDEX, "not JSON"),
    "a list": (put(INDEX, b"[]"), INDEX, "not a JSON object"),
    "HTML": (put(INDEX, b"<html></html>"), INDEX, "not JSON"),
    "not UTF-8": (put(INDEX, b"\x80"), INDEX, "not UTF-8"),
    "nested": (put(INDEX, b"[" * 10**5), INDEX, "brackets"),
    "of numbers": (many(b"257,", 5 * MILLION, INDEX), INDEX, "commas"),
    "of many names": (map_of(400_000, ONE), INDEX, "far too many"),
    "of 100,000 names": (map_of(100_000, ONE), INDEX, "100063 faults"),
    "of 100,000 files": (map_of(100_000), "100000 of 100000 files"),
    "too long": (put(INDEX, b" " * 26 * MILLION), INDEX, "more than"),
    "a tensor twice": (
        put(INDEX, f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'.encode()),
        INDEX,
        "'a' is given twice",
    ),
    "a directory": (special(INDEX, os.mkdir), INDEX, "not a regular file"),
    "a pipe": (special(INDEX, os.mkfifo), INDEX, "not a regular file"),
    "a tensor that its file lacks": (
        edit_json(INDEX, lambda index: index["weight_map"].update(other=TWO)),
        f"'other' is not in {TWO}",
    ),
    "a tensor in another file": (
        edit_json(INDEX, lambda index: index["weight_map"].update({FP8: TWO})),
        f"'{FP8}' is in {ONE}",
        f"in {TWO}",
    ),
    "a tensor that it lacks": (
        edit_json(INDEX, lambda index: index["weight_map"].pop(FP8)),
        f"'{FP8}' is in {ONE}",
        "not at all",
    ),
    "beside a single file": (in_one_file, SINGLE, INDEX, "both"),
}
