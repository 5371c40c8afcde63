"""A small configuration whose sizes are odd or unequal, so that none can be swapped."""

from dsv4_eqx import Config, YarnScaling
from dsv4_eqx.config.kinds import CSA, HASH_MOE, HCA, SLIDING, TOPK_MOE


def tiny_config(**changes) -> Config:
    """Configuration T: six layers of every kind, with YaRN and a SwiGLU that clamps."""
    fields = dict(
        vocab_size=97,
        hidden_size=60,
        moe_intermediate_size=28,
        num_hidden_layers=6,
        num_attention_heads=6,
        head_dim=20,
        qk_rope_head_dim=8,
        q_lora_rank=22,
        o_groups=3,
        o_lora_rank=14,
        n_routed_experts=7,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        swiglu_limit=1.0,
        sliding_window=9,
        layer_types=(SLIDING, HCA, CSA, HCA, CSA, CSA),
        compress_ratios=(0, 16, 4, 16, 4, 4),
        mlp_layer_types=(HASH_MOE, HASH_MOE) + (TOPK_MOE,) * 4,
        index_n_heads=16,
        index_head_dim=12,
        index_topk=5,
        rope_scaling=YarnScaling(16, 64),
        max_position_embeddings=1024,
        num_nextn_predict_layers=1,
    )
    return Config(**(fields | changes))
