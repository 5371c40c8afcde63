"""DeepSeek-V4 in JAX: plain Equinox modules with checked, shardable shapes.

Every array field carries an annotation such as `Float[Array, "heads head_dim q_rank"]`.
The names in it are the model's dimensions. `DIMENSIONS` lists them, each with a single
meaning; `partition_specs` turns them into shardings.
"""

from dsv4_eqx.attention.attention import Attention as Attention
from dsv4_eqx.attention.compressor import Compressor as Compressor
from dsv4_eqx.attention.indexer import Indexer as Indexer
from dsv4_eqx.attention.values import AttentionValues as AttentionValues
from dsv4_eqx.attention.values import IndexerValues as IndexerValues
from dsv4_eqx.checkpoint.load import from_pretrained as from_pretrained
from dsv4_eqx.checkpoint.save import save_pretrained as save_pretrained
from dsv4_eqx.checkpoint.state_dict import from_state_dict as from_state_dict
from dsv4_eqx.checkpoint.tokenizer import ByteTokenizer as ByteTokenizer
from dsv4_eqx.checkpoint.tokenizer import load_tokenizer as load_tokenizer
from dsv4_eqx.config.config import Config as Config
from dsv4_eqx.config.drafter import DSparkConfig as DSparkConfig
from dsv4_eqx.dimensions import DIMENSIONS as DIMENSIONS
from dsv4_eqx.generation.capacity import grow_cache as grow_cache
from dsv4_eqx.generation.generate import generate as generate
from dsv4_eqx.generation.generate import generate_stream as generate_stream
from dsv4_eqx.generation.result import Generated as Generated
from dsv4_eqx.generation.sampling import Sampling as Sampling
from dsv4_eqx.generation.stream import TokenStream as TokenStream
from dsv4_eqx.hyper_connection import HyperConnection as HyperConnection
from dsv4_eqx.hyper_connection import HyperHead as HyperHead
from dsv4_eqx.kernels.form import use_kernels as use_kernels
from dsv4_eqx.model.abstract import AbstractModel as AbstractModel
from dsv4_eqx.model.abstract import Cache as Cache
from dsv4_eqx.model.block import Block as Block
from dsv4_eqx.model.layers import Layers as Layers
from dsv4_eqx.model.model import DeepSeekV4 as DeepSeekV4
from dsv4_eqx.model.mtp import MTP as MTP
from dsv4_eqx.model.observed import LayerValues as LayerValues
from dsv4_eqx.model.replace_layer import replace_layer as replace_layer
from dsv4_eqx.moe.experts import Experts as Experts
from dsv4_eqx.moe.experts import SharedExpert as SharedExpert
from dsv4_eqx.moe.moe import MoE as MoE
from dsv4_eqx.moe.router import HashRouter as HashRouter
from dsv4_eqx.moe.router import Routing as Routing
from dsv4_eqx.moe.router import TopKRouter as TopKRouter
from dsv4_eqx.plan.costs import flops_per_token as flops_per_token
from dsv4_eqx.primitives.linear import GroupedLinear as GroupedLinear
from dsv4_eqx.primitives.norm import RMSNorm as RMSNorm
from dsv4_eqx.primitives.norm import UnweightedRMSNorm as UnweightedRMSNorm
from dsv4_eqx.primitives.rotary import RotaryEmbedding as RotaryEmbedding
from dsv4_eqx.primitives.rotary import YarnScaling as YarnScaling
from dsv4_eqx.sharding.mesh import make_mesh as make_mesh
from dsv4_eqx.sharding.rules import DEFAULT_RULES as DEFAULT_RULES
from dsv4_eqx.sharding.rules import partition_specs as partition_specs
from dsv4_eqx.sharding.shard import shard as shard
from dsv4_eqx.sharding.sharded_model import ShardedModel as ShardedModel
from dsv4_eqx.training.balance import BalanceParts as BalanceParts
from dsv4_eqx.training.balance import balance_loss as balance_loss
from dsv4_eqx.training.balance import scored_routings as scored_routings
from dsv4_eqx.training.cast import cast as cast
from dsv4_eqx.training.losses import NextTokenParts as NextTokenParts
from dsv4_eqx.training.losses import next_token_loss as next_token_loss
from dsv4_eqx.training.masks import apply_mask as apply_mask
from dsv4_eqx.training.masks import decay_mask as decay_mask
from dsv4_eqx.training.masks import layer_mask as layer_mask
from dsv4_eqx.training.masks import trainable as trainable
from dsv4_eqx.training.optimizer import optimizer as optimizer
from dsv4_eqx.training.roles import describe_optimizer as describe_optimizer
from dsv4_eqx.training.router_bias import update_router_bias as update_router_bias
from dsv4_eqx.training.schedule import schedule as schedule
