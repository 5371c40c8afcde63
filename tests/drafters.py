"""A release with the drafter DSpark, and what it drafts, in plain numpy.

The oracle is written from the description of the drafter in float64, one row and one
token at a time, without a cache: it shares nothing with the library.
"""

import json

import jax.numpy as jnp
import numpy as np

from dsv4_eqx import DSparkConfig
from dsv4_eqx.checkpoint.drafter_load import abstract_drafter
from dsv4_eqx.checkpoint.names import drafter_sources
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE
from tests.official import (
    QUANTISED,
    QUANTIZATION,
    random_codes,
    scale_name,
    wide_config,
    write_tensors,
)

CONFIG = wide_config(
    num_hidden_layers=3,
    layer_types=(SLIDING, HCA, CSA),
    compress_ratios=(0, 16, 4),
    mlp_layer_types=(HASH_MOE, TOPK_MOE, TOPK_MOE),
)
SIZES = DSparkConfig(
    block_size=3,
    noise_token_id=101,
    target_layer_ids=(0, 2),
    markov_rank=10,
    num_stages=2,
)


def drafter_tensors(config=CONFIG, sizes=SIZES, seed=5):
    """Tensors by name as a release has them: FP8, and the experts FP4."""
    generator, tensors = np.random.default_rng(seed), {}
    drafter = abstract_drafter(config, sizes, jnp.bfloat16)
    for source, leaf in drafter_sources(drafter):
        for name in source.names.flat:
            shape = source.tensor_shape
            if source.path.endswith((*QUANTISED, "main_in")):
                is_fp4 = ".moe.experts." in source.path
                codes, scales = random_codes(generator, shape, is_fp4)
                tensors |= {name: codes, scale_name(name): scales}
                continue
            value = generator.normal(size=shape) / np.sqrt(shape[-1])
            value = 1 + 0.2 * value if "norm" in source.path else value
            tensors[name] = value.astype(leaf.dtype)
    return tensors


def write_drafter(directory, tensors, config=CONFIG, sizes=SIZES, **changes):
    """A checkpoint with a drafter in one file; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = config.to_hf() | sizes.to_hf() | {"quantization_config": QUANTIZATION}
    raw["compress_ratios"] = raw["compress_ratios"] + [0] * sizes.num_stages
    raw |= {"num_nextn_predict_layers": 1} | changes
    (directory / "config.json").write_text(json.dumps(raw))
    write_tensors(directory / "model.safetensors", tensors)
    return directory


class Oracle:
    """What a drafter drafts, of weights by their official names."""

    def __init__(self, weights, config=CONFIG, sizes=SIZES):
        self.weights = {k: v.astype(np.float64) for k, v in weights.items()}
        self.config, self.sizes = config, sizes

    def draft(self, means, anchor):
        """Tokens, logits and confidence after `means` of all tokens, `[p, 3, dim]`."""
        config, w, last = self.config, self.weights, self.sizes.num_stages - 1
        p, gamma = len(means), self.sizes.block_size
        joined = means.reshape(p, -1)
        context = norm(
            joined @ w["mtp.0.main_proj.weight"].T, w["mtp.0.main_norm.weight"]
        )
        ids = [anchor] + [self.sizes.noise_token_id] * (gamma - 1)
        streams = np.repeat(w["embed.weight"][ids][:, None], config.hc_mult, axis=1)
        for stage in range(last + 1):
            streams = self.block(f"mtp.{stage}.", streams, context, p)
        h = np.stack([self.collapse(f"mtp.{last}.hc_head", x) for x in streams])
        u = norm(h, w[f"mtp.{last}.norm.weight"]) @ w["head.weight"].T
        before, found = anchor, []
        for i in range(gamma):
            e = w[f"mtp.{last}.markov_head.markov_w1.weight"][before]
            logits = u[i] + w[f"mtp.{last}.markov_head.markov_w2.weight"] @ e
            proj = w[f"mtp.{last}.confidence_head.proj.weight"][0]
            before = int(np.argmax(logits))
            found.append((before, logits, proj @ np.concatenate([h[i], e])))
        return tuple(np.array(x) for x in zip(*found))

    def block(self, name, streams, context, p):
        """A stage: attention and experts, each between two mixings of the streams."""
        for site, part in (("attn", self.attention), ("ffn", self.moe)):
            pre, post, comb = self.mixing(f"{name}hc_{site}", streams)
            x = np.einsum("ts,tsd->td", pre, streams)
            y = part(
                name, norm(x, self.weights[f"{name}{site}_norm.weight"]), context, p
            )
            streams = post[:, :, None] * y[:, None] + np.einsum(
                "tjk,tjd->tkd", comb, streams
            )
        return streams

    def mixing(self, name, streams):
        c, w = self.config, self.weights
        n, flat = c.hc_mult, streams.reshape(len(streams), -1)
        scale, base = w[f"{name}_scale"], w[f"{name}_base"]
        rms = 1 / np.sqrt(np.mean(flat**2, axis=1, keepdims=True) + c.rms_norm_eps)
        mixes = flat @ w[f"{name}_fn"].T * rms
        pre = sigmoid(mixes[:, :n] * scale[0] + base[:n]) + c.hc_eps
        post = 2 * sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
        comb = softmax(comb) + c.hc_eps
        comb = comb / (comb.sum(-2, keepdims=True) + c.hc_eps)
        for _ in range(c.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdims=True) + c.hc_eps)
            comb = comb / (comb.sum(-2, keepdims=True) + c.hc_eps)
        return pre, post, comb

    def collapse(self, name, x):
        c, w = self.config, self.weights
        flat = x.reshape(-1)
        mixes = w[f"{name}_fn"] @ flat / np.sqrt(np.mean(flat**2) + c.rms_norm_eps)
        pre = sigmoid(mixes * w[f"{name}_scale"] + w[f"{name}_base"]) + c.hc_eps
        return pre @ x

    def attention(self, name, x, context, p):
        c, w = self.config, {k: self.weights[f"{name}attn.{k}"] for k in _ATTENTION}
        window, heads = c.sliding_window, c.num_attention_heads

        def key(of, position):
            return self.rotate(
                norm(w["wkv.weight"] @ of, w["kv_norm.weight"]), position
            )

        keys = [key(context[j], j) for j in range(max(0, p - window), p)]
        keys = np.stack(keys + [key(x[i], p + i) for i in range(len(x))])
        out = []
        for i, row in enumerate(x):
            q = w["wq_b.weight"] @ norm(w["wq_a.weight"] @ row, w["q_norm.weight"])
            q = q.reshape(heads, c.head_dim)
            q = q / np.sqrt(np.mean(q**2, axis=1, keepdims=True) + c.rms_norm_eps)
            q = np.stack([self.rotate(head, p + i) for head in q])
            logits = np.column_stack([q @ keys.T * c.head_dim**-0.5, w["attn_sink"]])
            o = softmax(logits)[:, :-1] @ keys
            o = np.stack([self.rotate(head, -(p + i)) for head in o])
            groups = o.reshape(c.o_groups, -1)
            down = w["wo_a.weight"].reshape(c.o_groups, c.o_lora_rank, -1)
            z = np.einsum("grd,gd->gr", down, groups).reshape(-1)
            out.append(w["wo_b.weight"] @ z)
        return np.stack(out)

    def rotate(self, x, position):
        dim = self.config.qk_rope_head_dim
        angle = position * self.config.rope_theta ** (-np.arange(0, dim, 2) / dim)
        a, b = x[-dim::2], x[-dim + 1 :: 2]
        turned = np.stack(
            [
                a * np.cos(angle) - b * np.sin(angle),
                a * np.sin(angle) + b * np.cos(angle),
            ]
        )
        return np.concatenate([x[:-dim], turned.T.reshape(-1)])

    def moe(self, name, x, *_):
        c, w = self.config, self.weights
        scores = np.sqrt(np.log1p(np.exp(x @ w[f"{name}ffn.gate.weight"].T)))
        chosen = np.argsort(-(scores + w[f"{name}ffn.gate.bias"]), axis=1)
        out = []
        for t, row in enumerate(x):
            experts = chosen[t, : c.num_experts_per_tok]
            weights = scores[t, experts] / scores[t, experts].sum()
            y = self.expert(f"{name}ffn.shared_experts.", row)
            for e, weight in zip(experts, weights * c.routed_scaling_factor):
                y = y + weight * self.expert(f"{name}ffn.experts.{e}.", row)
            out.append(y)
        return np.stack(out)

    def expert(self, name, x):
        w1, w2, w3 = (self.weights[f"{name}w{i}.weight"] for i in (1, 2, 3))
        limit = self.config.swiglu_limit
        gate, up = np.minimum(w1 @ x, limit), np.clip(w3 @ x, -limit, limit)
        return w2 @ (gate * sigmoid(gate) * up)


_ATTENTION = (
    "attn_sink wq_a.weight q_norm.weight wq_b.weight wkv.weight kv_norm.weight "
    "wo_a.weight wo_b.weight"
).split()


def norm(x, weight, eps=1e-6):
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)
