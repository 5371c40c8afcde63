"""The names that transformers writes, and the published ones that they stand for.

When transformers saves a DeepSeek-V4 it turns its own names back into DeepSeek's by
patterns that catch only some of them, others for a model that it loaded than for one
that it made. What is certain is a tensor for each expert under a `model.` prefix. Of a
model that it loaded under its own names it renames nothing but some norms.
"""

import re
from collections.abc import Iterable
from typing import Final

_MIXED: Final = re.compile(r"^model\.layers\.\d+\.(?:ffn|mlp)\.experts\.\d+\.w[123]\.")
_PREFIX: Final = "model."
# In this order, each on what the ones before have left.
_OFFICIAL: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.compressor\.indexer\.(?:q_b_proj|wq_b)\.", ".indexer.wq_b."),
        (
            r"\.compressor\.indexer\.(?:scorer\.)?weights_proj\.",
            ".indexer.weights_proj.",
        ),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"\.weight_scale_inv$", ".scale"),
    )
)
# On the names of Hugging Face.
_HF: Final = (
    (
        re.compile(
            r"^(model\.layers\.\d+\.self_attn\.(?:compressor\.(?:indexer\.)?)?)norm\."
        ),
        r"\1kv_norm.",
    ),
)


def is_mixed(names: Iterable[str]) -> bool:
    """Whether these are the mixed names, of a model that transformers saved.

    **Arguments:**

    - `names`: of all tensors.
    """
    return any(_MIXED.match(name) for name in names)


def published_names(names: Iterable[str], *, mixed: bool) -> dict[str, str]:
    """From the published name that each of some names means to that name.

    **Arguments:**

    - `names`: of all tensors.
    - `mixed`: whether they are the mixed ones, which mean official names. Of others
        those mean another name that transformers has renamed.

    **Raises:** ValueError if two of them mean the same tensor.
    """
    prefix, patterns = (_PREFIX, _OFFICIAL) if mixed else ("", _HF)
    found = {}
    for name in names:
        meant = name.removeprefix(prefix)
        for pattern, replacement in patterns:
            meant = pattern.sub(replacement, meant)
        if meant in found:
            raise ValueError(f"{found[meant]} and {name} are the same tensor, {meant}")
        found[meant] = name
    return found
