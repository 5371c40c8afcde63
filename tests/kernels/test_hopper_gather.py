"""The gather's inline code, run by an interpreter of the few instructions it has."""

import re

import numpy as np
import pytest

from dsv4_eqx.kernels.hopper_gather import BLOCK, _gather_code

THREADS = 128
WINDOW_AT, ENTRIES_AT = 1 << 34, 1 << 35  # beyond 32 bits
BLOCK_AT, BIAS_AT = 4096, 1024


class Machine:
    """Threads of a warpgroup, one number of each in every register."""

    def __init__(self, code, operands, memory, shared):
        for i, value in enumerate(operands):
            code = re.sub(rf"\${i}\b", f"operand{i}", code)
        code = re.sub(r"\.reg[^;]*;", "", code.strip()[1:-1])
        self.lines = [line.strip() for line in code.split(";") if line.strip()]
        thread = np.arange(THREADS) + 2 * THREADS  # the third warpgroup's
        self.registers = {f"operand{i}": v for i, v in enumerate(operands)}
        self.registers["%tid.x"] = thread
        self.memory, self.shared = memory, shared

    def value(self, name):
        if name in self.registers:
            return np.broadcast_to(self.registers[name], THREADS)
        return np.full(THREADS, int(name, 0))

    def run(self):
        for line in self.lines:
            predicate = np.full(THREADS, True)
            if line.startswith("@"):
                name, line = line[1:].split(None, 1)
                predicate = self.value(name) != 0
            name, _, rest = line.partition(" ")
            if name.startswith("cp.async.commit"):
                continue
            operands = re.findall(r"\[.*?\]|\{.*?\}|[^,\s]+", rest)
            self.step(name, operands, predicate)

    def step(self, name, operands, predicate):
        if name == "cp.async.cg.shared.global":
            to, start = self.addresses(operands[0]), self.addresses(operands[1])
            for thread, size in enumerate(self.value(operands[3])):
                copied = self.memory(start[thread], 16) if size else bytes(16)
                self.shared[to[thread] : to[thread] + 16] = bytearray(copied)
            return
        if name == "st.shared.v4.b32":
            to = self.addresses(operands[0])
            names = operands[1].strip("{}").split(", ")
            four = np.stack([self.value(n) for n in names], axis=1).astype("u4")
            for thread in np.flatnonzero(predicate):
                self.shared[to[thread] : to[thread] + 16] = four[thread].tobytes()
            return
        to, *names = operands
        values = [self.value(n).astype("i8") for n in names]
        new = self.result(name.split(".")[:2], values)
        self.registers[to] = np.where(predicate, new, self.registers.get(to, 0))

    def addresses(self, operand):
        base, offset = (
            operand.strip("[]").split(" + ")
            if "+" in operand
            else (
                operand.strip("[]"),
                "0",
            )
        )
        return self.value(base) + int(offset)

    def result(self, name, values):
        simple = {
            "mov": lambda x: x,
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "and": np.bitwise_and,
            "xor": np.bitwise_xor,
            "shl": np.left_shift,
            "shr": np.right_shift,
            "max": np.maximum,
            "selp": lambda x, y, p: np.where(p, x, y),
        }
        if name[0] == "setp":
            return {"ge": np.greater_equal, "eq": np.equal}[name[1]](*values)
        return simple[name[0]](*values)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_the_code_writes_rows_in_swizzled_tiles(head_dim):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1 << 16, (40 + 30, head_dim)).astype("u2")
    window, entries = rows[:40].tobytes(), rows[40:].tobytes()

    def memory(at, size):
        start, held = (WINDOW_AT, window) if at < ENTRIES_AT else (ENTRIES_AT, entries)
        assert 0 <= at - start <= len(held) - size
        return held[at - start : at - start + size]

    indices = rng.integers(-1, 70, BLOCK)
    indices[rng.random(BLOCK) < 0.2] = -1
    indices[:6] = [-1, 0, 39, 40, 69, -7]
    shared = bytearray(BLOCK_AT + BLOCK * head_dim * 2)
    four = np.repeat(indices.reshape(-1, 4), 8, axis=0).T
    operands = [*four, BLOCK_AT, BIAS_AT, WINDOW_AT, ENTRIES_AT]
    Machine(_gather_code(head_dim, 40), operands, memory, shared).run()

    expected = np.where(indices[:, None] >= 0, rows[indices], 0)
    tiles = expected.reshape(8, 8, head_dim // 64, 8, 8).swapaxes(1, 2)
    swizzle = np.arange(8) ^ np.arange(8)[:, None]
    tiles = np.take_along_axis(tiles, swizzle[None, None, :, :, None], axis=3)
    assert bytes(shared[BLOCK_AT:]) == tiles.astype("u2").tobytes()
    bias = np.frombuffer(shared, "f4", BLOCK, BIAS_AT)
    np.testing.assert_array_equal(bias, np.where(indices >= 0, 0, -np.inf))
