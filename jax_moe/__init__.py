"""FP8 block-scaled mixture of experts for JAX."""

from jax_moe.config import DEEPSEEK_V3 as DEEPSEEK_V3
from jax_moe.config import MoEConfig as MoEConfig
from jax_moe.types import DispatchPlan as DispatchPlan
from jax_moe.types import Quantized as Quantized
from jax_moe.types import Routing as Routing
