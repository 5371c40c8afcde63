"""DeepSeek-V4 in JAX: plain Equinox modules with checked, shardable shapes.

Every array field carries an annotation such as `Float[Array, "heads head_dim q_rank"]`.
The names in it are the model's dimensions, listed in `DIMENSIONS` and used nowhere with
another meaning; `partition_specs` turns them into shardings.
"""

from typing import Final

# Dimension names in the annotations of arrays that modules hold.
DIMENSIONS: Final[dict[str, str]] = {
    "dim": "channels of a token; also of whatever a norm normalises",
    "vocab": "token ids",
    "streams": "parallel residual streams",
    "mixes": "hyper-connection coefficients: streams to read, to write, and to mix",
    "heads": "attention heads",
    "head_dim": "channels of a head, and of a compressed entry",
    "q_rank": "channels of the query latent",
    "groups": "groups of heads in the output projection",
    "in_per_group": "channels that go into a group",
    "out_per_group": "channels that come out of a group",
    "series": "interleaved series of a compressor: 2 if its windows overlap",
    "ratio": "tokens in a compressed entry",
    "index_heads": "heads of the indexer",
    "index_dim": "channels of an indexer head",
    "experts": "routed experts",
    "expert_hidden": "inner channels of a routed expert",
    "shared_hidden": "inner channels of the shared expert",
    "routes": "experts that a router scores; on every device",
    "hashed_vocab": "token ids in a routing table; on every device",
    "slots": "experts that a token is sent to",
}

from dsv4_eqx.abstract import AbstractModel as AbstractModel
from dsv4_eqx.abstract import Cache as Cache
from dsv4_eqx.attention.attention import Attention as Attention
from dsv4_eqx.attention.compressor import Compressor as Compressor
from dsv4_eqx.attention.indexer import Indexer as Indexer
from dsv4_eqx.block import Block as Block
from dsv4_eqx.checkpoint.load import from_pretrained as from_pretrained
from dsv4_eqx.checkpoint.save import save_pretrained as save_pretrained
from dsv4_eqx.checkpoint.state_dict import from_state_dict as from_state_dict
from dsv4_eqx.config import Config as Config
from dsv4_eqx.costs import flops_per_token as flops_per_token
from dsv4_eqx.costs import num_active_params as num_active_params
from dsv4_eqx.generation.generate import Generated as Generated
from dsv4_eqx.generation.generate import generate as generate
from dsv4_eqx.generation.generate import generate_stream as generate_stream
from dsv4_eqx.generation.stream import TokenStream as TokenStream
from dsv4_eqx.hyper_connection import HyperConnection as HyperConnection
from dsv4_eqx.hyper_connection import HyperHead as HyperHead
from dsv4_eqx.kernels.form import use_kernels as use_kernels
from dsv4_eqx.layers import Layers as Layers
from dsv4_eqx.model import DeepSeekV4 as DeepSeekV4
from dsv4_eqx.moe.experts import Experts as Experts
from dsv4_eqx.moe.experts import SharedExpert as SharedExpert
from dsv4_eqx.moe.moe import MoE as MoE
from dsv4_eqx.moe.router import HashRouter as HashRouter
from dsv4_eqx.moe.router import TopKRouter as TopKRouter
from dsv4_eqx.mtp import MTP as MTP
from dsv4_eqx.primitives.linear import GroupedLinear as GroupedLinear
from dsv4_eqx.primitives.norm import RMSNorm as RMSNorm
from dsv4_eqx.primitives.norm import UnweightedRMSNorm as UnweightedRMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding as RotaryEmbedding
from dsv4_eqx.primitives.rotary import YarnScaling as YarnScaling
from dsv4_eqx.sharding.mesh import make_mesh as make_mesh
from dsv4_eqx.sharding.rules import DEFAULT_RULES as DEFAULT_RULES
from dsv4_eqx.sharding.rules import partition_specs as partition_specs
from dsv4_eqx.sharding.sharded_model import ShardedModel as ShardedModel
from dsv4_eqx.sharding.sharded_model import shard as shard
from dsv4_eqx.tokenizer import load_tokenizer as load_tokenizer
