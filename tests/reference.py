"""Hugging Face's DeepSeek-V4 as the oracle: the same configuration and weights."""

import numpy as np
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_eqx import Config, DeepSeekV4, from_state_dict


def reference_config(config: Config) -> DeepseekV4Config:
    """transformers' form of a configuration; one ratio for each kind of layer."""
    rates = {}
    for kind, ratio in zip(config.layer_types, config.compress_ratios):
        assert rates.setdefault(kind, ratio) == ratio
    rates.pop("sliding_attention", None)
    scaling = config.rope_scaling
    rope = None
    if scaling is not None:
        rope = dict(
            rope_type="yarn",
            factor=float(scaling.factor),
            original_max_position_embeddings=scaling.original_max_position,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
        )
    shared = {
        name: getattr(config, name)
        for name in (
            "vocab_size hidden_size moe_intermediate_size num_hidden_layers "
            "num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_groups "
            "o_lora_rank n_routed_experts num_experts_per_tok routed_scaling_factor "
            "swiglu_limit sliding_window index_n_heads index_head_dim index_topk "
            "hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps rope_theta "
            "compress_rope_theta max_position_embeddings initializer_range "
            "bos_token_id eos_token_id"
        ).split()
    }
    return DeepseekV4Config(
        **shared,
        layer_types=list(config.layer_types),
        mlp_layer_types=list(config.mlp_layer_types),
        compress_rates=rates,
        rope_parameters=rope,
        pad_token_id=None,
        attn_implementation="eager",
    )


def reference_model(config: Config, seed: int = 0) -> DeepseekV4ForCausalLM:
    """transformers' model in float32 with weights large enough to matter everywhere."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(reference_config(config)).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(parameter):
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, parameter in named.items():
            if "inv_freq" in name:
                continue
            if "tid2eid" in name:
                high = config.n_routed_experts
                shape = parameter.shape
                parameter.copy_(torch.randint(0, high, shape, generator=generator))
            elif "norm.weight" in name or "layernorm" in name:
                parameter.copy_(1 + 0.2 * normal(parameter))
            elif name.endswith("scale"):
                parameter.copy_(1 + 0.3 * normal(parameter))
            elif parameter.dim() >= 2 and "embed" not in name:
                parameter.copy_(normal(parameter) * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.5 * normal(parameter))
    return model


def ours(config: Config, reference: DeepseekV4ForCausalLM) -> DeepSeekV4:
    """Our model with the reference's weights, through the table of names."""
    tensors = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    return from_state_dict(config, tensors)


def as_torch(x) -> torch.Tensor:
    """An array as a tensor of its own."""
    return torch.tensor(np.asarray(x))
