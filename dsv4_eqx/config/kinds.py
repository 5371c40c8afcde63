"""The kinds of layers, under the names that Hugging Face's configurations give them."""

from typing import Final

# Of attention: a window alone; with the best of the short compressed windows; with all
# of the long ones (paper section 2.3).
SLIDING: Final = "sliding_attention"
CSA: Final = "compressed_sparse_attention"
HCA: Final = "heavily_compressed_attention"
# Of routing: experts by token id, or by score (paper section 2.1).
HASH_MOE: Final = "hash_moe"
TOPK_MOE: Final = "moe"

# What a layer is in the releases, whose configurations give its ratio alone.
KIND_OF_RATIO: Final = {0: SLIDING, 4: CSA, 128: HCA}
