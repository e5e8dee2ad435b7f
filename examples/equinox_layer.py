"""jax_moe's layer inside of an Equinox module: the weights are a field, the pytree they are.

    python examples/equinox_layer.py

Needs equinox (`pip install equinox`). `jax_moe.nn.moe_layer` is the only function that is called.
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
    import equinox as eqx
except ImportError as error:
    sys.exit(f"equinox_layer.py: {error}: pip install equinox")

from jax_moe import ExpertWeights, MoEConfig, nn
from jax_moe.types import LayerWeights
from pallas_kernels import interruption


class MoEBlock(eqx.Module):
    """Norm, mixture of experts, residual."""

    norm: eqx.nn.RMSNorm
    weights: LayerWeights  # from `jax_moe.checkpoint.load_layer`
    config: nn.LayerConfig = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """bf16[T,H] to bf16[T,H]. The FP8 weights get no gradient."""
        weights = jax.lax.stop_gradient(self.weights)
        normed = jax.vmap(self.norm)(x.astype(jnp.float32)).astype(jnp.bfloat16)
        return x + nn.moe_layer(weights, normed, config=self.config)


def main() -> jax.Array:
    """Makes a block of constant weights and runs it once."""
    experts, hidden, width = 8, 256, 128
    router = MoEConfig(top_k=2, scoring="softmax")
    config = nn.LayerConfig(router, experts, hidden, width, has_routing_bias=False)
    weights = ExpertWeights(
        jnp.ones((experts, 2 * width, hidden), jnp.float8_e4m3fn),
        jnp.full((experts, 2 * width // 128, hidden // 128), 0.01, jnp.float32),
        jnp.ones((experts, hidden, width), jnp.float8_e4m3fn),
        jnp.full((experts, hidden // 128, width // 128), 0.01, jnp.float32),
    )
    gate = jax.random.normal(jax.random.key(0), (experts, hidden), jnp.float32)
    block = MoEBlock(eqx.nn.RMSNorm(hidden), LayerWeights(weights, gate), config)
    x = jax.random.normal(jax.random.key(1), (5, hidden), jnp.bfloat16)
    out = eqx.filter_jit(block)(x)
    print(out.shape, out.dtype)
    return out


def command() -> None:
    """Command line, which takes no arguments."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()


if __name__ == "__main__":
    interruption.exit_with(command)
