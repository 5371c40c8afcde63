"""What a token costs, from a configuration alone: forward arithmetic.

Below, dim is the model's width, c a head's, ratio the tokens in a compressed entry, and
series is 2 for compressed sparse attention (CSA) and 1 for the heavy kind (HCA).
"""

from typing import Final

from dsv4_eqx.config.config import Config
from dsv4_eqx.config.kinds import CSA, SLIDING
from dsv4_eqx.numerics.validation import validate_size

_MULTIPLY_ADD: Final = 2  # floating-point operations


def flops_per_token(config: Config, seq: int) -> float:
    """Forward floating-point operations of a token, the mean over a whole sequence.

    Twice the multiply-adds of matrix products and weighted sums, without prediction
    (MTP) blocks. Norms, activations, softmaxes, rotations and the routing weights count
    nothing, and neither does looking the embedding up. A token costs, in multiply-adds,

    - every matrix that it is multiplied with its size, of the routed experts' those
      that it runs; compressors' only for tokens of complete windows, the share
      (seq // ratio) x ratio / seq,
    - each compressor's pooling: series x c for the same tokens,
    - attention: 2 x heads x c for each key it sees. These are min(t + 1, window) keys
      at position t, and (t + 1) // ratio entries: all of them in HCA, at most
      `index_topk` in CSA,
    - in CSA the indexer, matrices included, only where there are more than `index_topk`
      entries: index_heads x (index_dim + 1) for each of the (t + 1) // ratio entries,
    - hyper-connections: streams x dim to read, (streams + 1) x streams x dim to write.

    Blocks of queries that share what they look at compute somewhat more than this.

    **Arguments:**

    - `config`: sizes and schedule.
    - `seq`: tokens of the sequence, which starts at position 0.

    **Raises:** ValueError if `seq` is no integer or below 1.
    """
    seq = validate_size("flops_per_token", "seq", seq)
    dim, streams = config.hidden_size, config.hc_mult
    head = streams * streams * dim + streams * dim
    unembedding = config.vocab_size * dim
    blocks = (_block_sums(config, i, seq) for i in range(config.num_hidden_layers))
    return float(_MULTIPLY_ADD * (head + unembedding + sum(blocks)))


def _block_sums(config: Config, layer: int, seq: int) -> float:
    """Multiply-adds of a token in a layer."""
    kind, ratio, _ = config.layer_kind(layer)
    sums = _attention_matrices(config) + _moe_matrices(config)
    seen = _mean_seen(seq, 1, config.sliding_window)
    if kind != SLIDING:
        sums += _compressor_sums(config, kind, ratio, config.head_dim, seq)
        most = config.index_topk if kind == CSA else seq
        seen += _mean_seen(seq, ratio, most)
    if kind == CSA and seq // ratio > config.index_topk:
        sums += _indexer_matrices(config)
        sums += _compressor_sums(config, kind, ratio, config.index_head_dim, seq)
        a_score = config.index_n_heads * (config.index_head_dim + 1)
        sums += a_score * _mean_seen(seq, ratio, seq)
    sums += 2 * config.num_attention_heads * config.head_dim * seen
    streams = config.hc_mult
    matrix = (2 + streams) * streams * streams * config.hidden_size
    mixing = (streams + (streams + 1) * streams) * config.hidden_size
    return sums + 2 * (matrix + mixing)


def _mean_seen(seq: int, ratio: int, most: int) -> float:
    """The mean of min((t + 1) // ratio, most) over the positions t below `seq`."""
    top = min(seq // ratio, most)
    # Each number from 0 to top - 1 is seen `ratio` times, though 0 one time less.
    total = ratio * top * (top - 1) // 2 + top * (seq + 1 - ratio * top)
    return total / seq


def _attention_matrices(config: Config) -> int:
    dim, rank = config.hidden_size, config.q_lora_rank
    inner = config.num_attention_heads * config.head_dim
    queries = rank * dim + inner * rank
    keys = config.head_dim * dim
    output = config.o_lora_rank * (inner + dim * config.o_groups)
    return queries + keys + output


def _indexer_matrices(config: Config) -> int:
    """Without its compressor's."""
    per_head = config.index_head_dim * config.q_lora_rank + config.hidden_size
    return config.index_n_heads * per_head


def _moe_matrices(config: Config) -> int:
    """Of the experts that a token runs, the shared one included, and the router."""
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    router = config.n_routed_experts * config.hidden_size
    return (config.num_experts_per_tok + 1) * expert + router


def _compressor_sums(
    config: Config, kind: str, ratio: int, head_dim: int, seq: int
) -> float:
    series = 2 if kind == CSA else 1  # windows that a token is pooled in
    a_token = series * head_dim * (2 * config.hidden_size + 1)
    return a_token * (seq // ratio * ratio) / seq
