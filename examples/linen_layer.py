"""jax_moe's layer inside of a Flax Linen module: the weights are a collection of their own.

    python examples/linen_layer.py

Linen, as any framework, needs nothing but the pure function `jax_moe.nn.moe_layer`. The FP8 weights
live in the collection "frozen", so that the optimizer of "params" never sees them.
"""

from __future__ import annotations

import argparse
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

import jax
import jax.numpy as jnp

try:
    from flax import linen
except ImportError as error:
    sys.exit(f"linen_layer.py: {error}: pip install '.[flax]'")

from jax_moe import ExpertWeights, MoEConfig, nn
from jax_moe.types import LayerWeights
from pallas_kernels import interruption

CONFIG = nn.LayerConfig(
    MoEConfig(top_k=2, scoring="softmax"),
    num_experts=8,
    hidden_size=256,
    intermediate_size=128,
    has_routing_bias=False,
)


class MoEBlock(linen.Module):
    """Norm, mixture of experts, residual."""

    config: nn.LayerConfig

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """bf16[...,H] to bf16[...,H]."""
        config = self.config
        experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        gate_shape = (experts, hidden)
        gate = self.param("gate", linen.initializers.lecun_normal(), gate_shape, jnp.float32)

        def frozen(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            # Real values come from `jax_moe.checkpoint.load_layer`.
            return self.variable("frozen", name, jnp.ones, shape, dtype).value

        weights = ExpertWeights(
            frozen("gemm1_weights", (experts, 2 * width, hidden), jnp.float8_e4m3fn),
            frozen("gemm1_weights_scale", (experts, 2 * width // 128, hidden // 128), jnp.float32),
            frozen("gemm2_weights", (experts, hidden, width), jnp.float8_e4m3fn),
            frozen("gemm2_weights_scale", (experts, hidden // 128, width // 128), jnp.float32),
        )
        normed = linen.RMSNorm(dtype=jnp.bfloat16)(x)
        return x + nn.moe_layer(LayerWeights(weights, gate), normed, config=config)


def main() -> jax.Array:
    """Initializes the block and runs it once."""
    block = MoEBlock(CONFIG)
    x = jax.random.normal(jax.random.key(0), (3, 5, CONFIG.hidden_size), jnp.bfloat16)
    variables = jax.jit(block.init)(jax.random.key(1), x)
    out = jax.jit(block.apply)(variables, x)
    print({kind: list(arrays) for kind, arrays in variables.items()}, out.shape, out.dtype)
    return out


def command() -> None:
    """Command line, which takes no arguments."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()


if __name__ == "__main__":
    interruption.exit_with(command)
