"""The arguments of `generate`, checked before anything is compiled."""

from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_eqx.generation.arguments import eos_ids, on_device, read_prompts
from dsv4_eqx.generation.capacity import grow_cache, grown, rounded_capacity
from dsv4_eqx.generation.prompt import Caches, parts, read_prompt, repeat_rows
from dsv4_eqx.generation.result import Generated
from dsv4_eqx.generation.sampling import Sampling
from dsv4_eqx.generation.steps import LogitsFn, Rows, Rules
from dsv4_eqx.generation.stop_strings import Texts, validate_stop
from dsv4_eqx.model.abstract import AbstractModel
from dsv4_eqx.model.inputs import validate_prediction_block
from dsv4_eqx.numerics.validation import (
    invalid_argument,
    is_concrete,
    validate_flag,
    validate_int,
    validate_key,
)


class Request(NamedTuple):
    """The validated arguments of a call."""

    tokens: Int[np.ndarray, "batch seq"]
    lengths: Int[np.ndarray, " batch"]
    max_new_tokens: int
    num_samples: int
    capacity: int
    after: Generated | None
    speculative: bool
    rules: Rules
    key: PRNGKeyArray | None
    texts: Texts | None
    has_stop: bool

    def rows(self) -> Rows:
        """The prompts, each repeated for its samples, in arrays of the capacity."""
        tokens = np.repeat(self.tokens, self.num_samples, axis=0)
        lengths = np.repeat(self.lengths, self.num_samples)
        batch, seq = tokens.shape
        padded = np.zeros((batch, self.capacity), np.int32)
        padded[:, :seq] = tokens
        zeros = np.zeros(batch, np.int32)
        is_done, log_probs = zeros > 0, np.zeros(padded.shape, np.float32)
        counts = zeros, zeros.copy()
        rows = (padded, log_probs, lengths, lengths.copy(), is_done, *counts)
        return Rows(*jax.device_put(rows))

    def read(
        self, model: AbstractModel
    ) -> tuple[Caches, Float[Array, "rows streams dim"]]:
        """The caches after the prompts, and their last tokens' streams, by sample."""
        after, before = self.after, None
        if after is not None:
            mtp = after.mtp_cache if self.speculative else None
            if mtp is not None and self.capacity > after.cache.capacity:
                batch = len(self.lengths)
                mtp = grown(mtp, model.init_mtp_cache(batch, self.capacity))
            before = Caches(grow_cache(model, after.cache, self.capacity), mtp)
        prompts = self.tokens, self.lengths
        read = read_prompt(model, *prompts, self.capacity, self.speculative, before)
        return read if self.num_samples == 1 else repeat_rows(*read, self.num_samples)


def checked_request(
    call: str,
    model: AbstractModel,
    tokens: Any,
    *,
    max_new_tokens: Any,
    lengths: Any,
    sampling: Any,
    key: Any,
    num_samples: Any,
    eos_id: Any,
    stop: Any,
    decode: Any,
    logits_fn: LogitsFn | None,
    capacity: Any,
    after: Any,
    speculative: Any,
) -> Request:
    """Validates the arguments of `call`, `generate` or `generate_stream`."""
    _validate_model(call, model, speculative, (tokens, lengths, key, after))
    sampling = _validate_sampling(call, sampling, key)
    new = validate_int(call, "max_new_tokens", max_new_tokens)
    num_samples = validate_int(call, "num_samples", num_samples)
    if logits_fn is not None and not callable(logits_fn):
        raise invalid_argument(call, "logits_fn", logits_fn, "a function, or None")
    stop, decode = validate_stop(call, stop, decode)
    eos = eos_ids(call, eos_id, model.config)
    prompts, sizes = read_prompts(call, tokens, lengths, model.config.vocab_size)
    before = np.zeros_like(sizes)
    if after is not None:
        prompts, sizes, before = _following(call, prompts, sizes, after, speculative)
    capacity = _capacity(call, model, capacity, sizes, before, new, after)
    ended = jax.device_get(eos).tolist()
    texts = None if decode is None else Texts(decode, stop, ended)
    return Request(
        prompts,
        sizes,
        new,
        num_samples,
        capacity,
        after,
        bool(speculative),
        Rules(sampling, eos, on_device(new, np.int32), logits_fn),
        None if sampling.is_greedy else key,
        texts,
        bool(stop),
    )


def _validate_model(call: str, model: Any, speculative: Any, arrays: tuple) -> None:
    if not isinstance(model, AbstractModel):
        allowed = "a DeepSeekV4 or a ShardedModel"
        raise invalid_argument(call, "model", type(model).__name__, allowed)
    leaves = jax.tree.leaves((model, arrays))
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if is_traced or not is_concrete(arrays[0]):
        raise ValueError(
            f"{call}: the model or the prompts are traced, or the prompts lie over "
            "several processes; it compiles its own loop: call it outside of jit, with "
            "prompts in lists or arrays of numpy."
        )
    validate_flag(call, "speculative", speculative)
    if speculative:
        validate_prediction_block(f"{call}(speculative=True)", model.num_mtp)


def _validate_sampling(call: str, sampling: Any, key: Any) -> Sampling:
    if sampling is None:
        sampling = Sampling(temperature=0)
    if not isinstance(sampling, Sampling):
        raise invalid_argument(call, "sampling", sampling, "a Sampling, or None")
    if key is not None:
        validate_key(call, key)
    elif not sampling.is_greedy:
        allowed = "a key, as from jax.random.key(0), where tokens are drawn"
        raise invalid_argument(call, "key", key, allowed)
    return sampling


def _following(
    call: str,
    prompts: Int[np.ndarray, "batch seq"],
    lengths: Int[np.ndarray, " batch"],
    after: Any,
    speculative: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts, each after the one token that the earlier cache does not have."""
    if not isinstance(after, Generated):
        allowed = "what generate gave, or None"
        raise invalid_argument(call, "after", type(after).__name__, allowed)
    if len(after.lengths) != len(lengths):
        raise ValueError(
            f"{call}: {len(lengths)} prompts cannot follow the {len(after.lengths)} "
            "rows of the earlier result: give one for each."
        )
    if speculative and after.mtp_cache is None:
        raise ValueError(
            f"{call}: the earlier result is without speculative=True, and has no cache "
            "of the prediction block."
        )
    ends, tokens, before = jax.device_get(
        (after.lengths, after.tokens, after.cache.lengths)
    )
    last = np.take_along_axis(tokens, ends[:, None] - 1, axis=1)
    return np.concatenate([last, prompts], axis=1), lengths + 1, before


def _capacity(
    call: str,
    model: AbstractModel,
    capacity: Any,
    lengths: Int[np.ndarray, " batch"],
    before: Int[np.ndarray, " batch"],
    new: int,
    after: Generated | None,
) -> int:
    """The capacity asked for, or that of the cache if it is enough, or a new one."""
    max_positions = model.config.max_position_embeddings
    least, longest = int((before + lengths).max()) + new, int(lengths.max())
    if least > max_positions:
        turns = f"{int(before.max())} tokens before, " if after is not None else ""
        raise ValueError(
            f"{call}: {turns}a prompt of {longest} tokens and max_new_tokens={new} are "
            f"beyond max_position_embeddings={max_positions}; give fewer."
        )
    existing = 0 if after is None else after.cache.capacity
    if capacity is not None:
        limits = {"least": max(least, existing), "most": max_positions}
        return validate_int(call, "capacity", capacity, **limits)
    if existing >= least:
        return existing
    # Every part of a prompt has the same size, so the last may end after the prompt.
    needed = int(before.max()) + sum(parts(longest)) + new
    return rounded_capacity(needed, max_positions)
