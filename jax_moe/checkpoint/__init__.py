"""FP8 checkpoints: one layer's weights, from disk to where the kernels want them, bits unchanged.

    >>> from jax_moe import checkpoint
    >>> experts = checkpoint.load_experts("DeepSeek-V3", 3, rank=0, num_ranks=8)  # doctest: +SKIP
    >>> layer = checkpoint.load_layer("DeepSeek-V3", 3, rank=0, num_ranks=8)      # doctest: +SKIP

Neither torch nor the safetensors package is needed to read. `docs/checkpoints.md` has the rest.
"""

from jax_moe.checkpoint.block_scales import pad_intermediate as pad_intermediate
from jax_moe.checkpoint.loader import load_experts as load_experts
from jax_moe.checkpoint.loader import load_layer as load_layer
from jax_moe.checkpoint.packed import load_packed as load_packed
from jax_moe.checkpoint.packed import save_packed as save_packed
from jax_moe.checkpoint.shards import Checkpoint as Checkpoint
from jax_moe.types import LayerWeights as LayerWeights
