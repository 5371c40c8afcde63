"""What bounds a part's cost: experts, the sliding window, depth.

    python benchmarks/parts.py

- The experts' products as a share of the rate of one plain product of the same work.
- Time and temporary memory of window attention from 4,096 to 16,384 tokens.
- Compile time of Pro's schedule at tiny widths, 9 and 61 layers.

Alternatives are timed in turn, and the median counts: machines are noisy.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp

from dsv4_eqx import Config, DeepSeekV4
from dsv4_eqx.config.kinds import SLIDING
from dsv4_eqx.model.parts import make_attention, make_experts

ROUNDS: Final = 15


def in_turn(*runs: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each, after one run that does not count."""
    seconds = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, taken in zip(runs, seconds):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_ > 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def bind(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], int]:
    """The compiled call, and the bytes of its temporaries."""
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return lambda: compiled(*args), memory.temp_size_in_bytes


def sized(**sizes: Any) -> Config:
    return dataclasses.replace(Config.tiny(), **sizes)


def experts(tokens: int) -> None:
    config = sized(
        hidden_size=512,
        moe_intermediate_size=256,
        n_routed_experts=32,
        num_experts_per_tok=4,
    )
    key = jax.random.key(0)
    module = make_experts(config, key=key)
    x = jax.random.normal(key, (tokens, 512))
    scores = jax.random.uniform(key, (tokens, 32))
    chosen, weights = jax.lax.top_k(scores, 4)[1], jnp.full((tokens, 4), 0.25)

    def forward(module, x):
        return module(x, chosen, weights)

    def backward(module, x):
        # A linear loss: its derivative costs nothing of its own.
        return jax.grad(lambda *args: jnp.sum(forward(*args)), (0, 1))(module, x)

    rows, matrix = jnp.ones((tokens * 4, 512)), jnp.ones((512, 3 * 256))
    calls = [
        bind(jnp.matmul, rows, matrix),
        bind(forward, module, x),
        bind(backward, module, x),
    ]
    plain, one_way, both = in_turn(*(run for run, _ in calls))
    print(
        f"experts, {tokens:5} tokens, 32 of 512 x 256, top 4: {plain / one_way:.0%} of "
        f"a plain product's rate forward, {3 * plain / both:.0%} forward + backward"
    )


def window() -> None:
    config = sized(
        hidden_size=256,
        num_attention_heads=64,
        head_dim=64,
        q_lora_rank=128,
        sliding_window=128,
    )
    key = jax.random.key(0)
    module = make_attention(config, SLIDING, 0, key=key)
    calls = []
    for tokens in (4096, 16384):
        x = jax.random.normal(key, (1, tokens, 256))
        positions = jnp.arange(tokens)[None]
        calls.append(bind(lambda m, x, p: m(x, p), module, x, positions))
    short, long = in_turn(*(run for run, _ in calls), rounds=5)
    memory = [temporaries / 1e6 for _, temporaries in calls]
    print(
        f"window attention, 64 heads of 64, 4,096 to 16,384 tokens: {short:.2f} to "
        f"{long:.2f} s, x {long / short:.1f}; temporaries {memory[0]:.0f} to "
        f"{memory[1]:.0f} MB, x {memory[1] / memory[0]:.1f}"
    )


def depth() -> None:
    seconds = {}
    for layers in (9, 61):
        kinds = {
            name: getattr(Config.pro(), name)[:layers]
            for name in ("layer_types", "compress_ratios", "mlp_layer_types")
        }
        config = sized(num_hidden_layers=layers, **kinds)
        model = eqx.filter_eval_shape(DeepSeekV4, config, key=jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 300), jnp.int32)
        start = time.perf_counter()
        jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).compile()
        seconds[layers] = time.perf_counter() - start
    print(
        f"compile time, Pro's schedule: {seconds[9]:.1f} s with 9 layers, "
        f"{seconds[61]:.1f} s with 61, x {seconds[61] / seconds[9]:.2f}"
    )


if __name__ == "__main__":
    experts(512)
    experts(2048)
    window()
    depth()
