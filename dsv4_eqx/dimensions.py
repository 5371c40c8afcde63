"""The glossary of dimensions: every name in the annotation of an array in a module.

A name means the same everywhere; `partition_specs` turns names into shardings.
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
    "targets": "layers of the model that a drafter reads",
    "markov_rank": "channels of a drafter's correction by the token before",
    "confidence_in": "dim and markov_rank together",
    "slots": "experts that a token is sent to",
    "adapter_rank": "channels between the two factors of a low-rank adapter",
}
