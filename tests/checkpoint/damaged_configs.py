"""Damaged configurations: what is done to a good checkpoint, what an error must say."""

import os

from tests.checkpoint.hostile import (
    CONFIG,
    edit_config,
    edit_json,
    put,
    remove,
    special,
)

MILLION = 10**6

CASES = {
    "no directory": (
        lambda d: [p.unlink() for p in d.iterdir()] and d.rmdir(),
        "no such",
    ),
    "no config": (remove(CONFIG), CONFIG),
    "config empty": (put(CONFIG, b""), CONFIG, "not JSON"),
    "config not JSON": (put(CONFIG, b"{'a': 1}"), CONFIG, "not JSON"),
    "config not UTF-8": (put(CONFIG, b'{"a": "\xff"}'), CONFIG, "not UTF-8"),
    "config a list": (put(CONFIG, b"[1]"), CONFIG, "not a JSON object"),
    "config nested": (put(CONFIG, b'{"a":' * 10**5), CONFIG, "nested too deeply"),
    "config of brackets": (put(CONFIG, b"[" * 2**20), CONFIG, "nested too deeply"),
    "config too long": (put(CONFIG, b" " * 2 * MILLION), CONFIG, "more than"),
    "config with a key twice": (
        put(CONFIG, b'{"a": 1, "a": 2}'),
        CONFIG,
        "'a'",
        "twice",
    ),
    "config with a number of 5000 digits": (put(CONFIG, b"9" * 5000), CONFIG),
    "config a directory": (special(CONFIG, os.mkdir), CONFIG, "not a regular file"),
    "config a pipe": (special(CONFIG, os.mkfifo), CONFIG, "not a regular file"),
    "V4.1": (edit_config(model_type="deepseek_v41"), CONFIG, "deepseek_v41"),
    "a Llama": (edit_config(model_type="llama"), CONFIG, "'llama'"),
    "a model type that is a list": (edit_config(model_type=[]), CONFIG, "model_type"),
    "unknown key": (edit_config(engram_size=3), CONFIG, "engram_size"),
    "missing key": (edit_json(CONFIG, lambda c: c.pop("head_dim")), CONFIG, "head_dim"),
    "contradictory kinds": (edit_config(compress_ratios=[4, 4, 0]), "compress_ratios"),
    "schedule too short": (
        edit_config(layer_types=["moe"]),
        "layer_types",
        "1 entries",
    ),
    "more layers than kinds": (edit_config(num_hidden_layers=3), "num_hidden_layers"),
    "negative": (edit_config(hidden_size=-64), CONFIG, "hidden_size=-64"),
    "zero": (edit_config(vocab_size=0), CONFIG, "vocab_size=0"),
    "float for an int": (edit_config(hidden_size=64.5), CONFIG, "hidden_size=64.5"),
    "bool for an int": (edit_config(o_groups=True), CONFIG, "o_groups=True"),
    "string for an int": (edit_config(hidden_size="64"), CONFIG, "hidden_size='64'"),
    "NaN": (edit_config(rms_norm_eps=float("nan")), CONFIG, "rms_norm_eps=nan"),
    "infinite": (edit_config(swiglu_limit=float("inf")), CONFIG, "swiglu_limit=inf"),
    "2**31 experts": (edit_config(n_routed_experts=2**31), CONFIG, "n_routed_experts"),
    "2**31 - 1 experts": (
        edit_config(n_routed_experts=2**31 - 1),
        "2147483647 experts",
    ),
    "80,000 experts": (edit_config(n_routed_experts=80_000), "80000 experts"),
    "8000 experts": (edit_config(n_routed_experts=8000), "experts.7999."),
    "10**9 layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "30,000 layers": (
        edit_config(
            num_hidden_layers=30_000,
            layer_types=None,
            mlp_layer_types=None,
            num_hash_layers=0,
            compress_ratios=[0, 4, 4] * 10_000,
        ),
        "30001 blocks",
    ),
    "10**9 prediction blocks": (
        edit_config(num_nextn_predict_layers=10**9, compress_ratios=None),
        "num_nextn_predict_layers=1000000000",
    ),
    "10,000 prediction blocks": (
        edit_config(num_nextn_predict_layers=10_000, compress_ratios=None),
        "num_nextn_predict_layers=10000",
    ),
    "vocabulary of 2**31 - 1": (edit_config(vocab_size=2**31 - 1), "embed.weight"),
    "hidden size of 2**31 - 1": (edit_config(hidden_size=2**31 - 1), "embed.weight"),
    "2**31 - 1 streams": (edit_config(hc_mult=2**31 - 1), "hc_attn_fn"),
    "2**31 - 1 heads": (
        edit_config(num_attention_heads=2**31 - 1, o_groups=1),
        "layers.0.attn.wq_b.weight",
    ),
    "all sizes 2**31 - 1": (
        edit_config(
            vocab_size=2**31 - 1,
            hidden_size=2**31 - 1,
            moe_intermediate_size=2**31 - 1,
            num_attention_heads=2**31 - 1,
            head_dim=2**31 - 1,
            o_groups=2**31 - 1,
            o_lora_rank=2**31 - 1,
            q_lora_rank=2**31 - 1,
            index_n_heads=2**31 - 1,
            index_head_dim=2**31 - 1,
            sliding_window=2**31 - 1,
            index_topk=2**31 - 1,
            hc_mult=2**31 - 1,
        ),
        "embed.weight",
    ),
    "blocks of 64": (
        edit_config(quantization_config={"weight_block_size": [64, 64]}),
        "weight_block_size",
        CONFIG,
    ),
    "another quantisation": (
        edit_config(quantization_config={"quant_method": "awq"}),
        "quant_method",
        CONFIG,
    ),
    "quantisation a list": (edit_config(quantization_config=[]), "quantization_config"),
}
