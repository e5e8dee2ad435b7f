"""Triton's own CPU interpreter: what it needs mended, and launches from NumPy and back.

TRITON_INTERPRET=1 is set before Triton is imported: `tests/test_triton_interpreter.py` starts a
process for the files that use this.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from interop.triton_launch import launch_torch
from jax_moe import GroupPlan
from pallas_kernels.triton import plan as plan_kernels
from pallas_kernels.triton import routing
from tests.fused import fma
from tests.moe_inputs import bits

# The interpreter computes with NumPy, which remarks on every infinity.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")

_NUMPY_TYPES = {
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
}


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch):
    """Four faults of Triton's interpreter.

    In 3.6, rounding loses the carry, and NumPy's scalars are those of old; in 3.7, the difference
    of a constant and a tensor, which is in a constexpr, is no argument of most functions. In both
    `tl.fma` rounds twice.
    """

    def convert(data, source, target, _rounding_mode):
        values = data.view(_NUMPY_TYPES[source.name]).astype(np.float32)
        return values.astype(_NUMPY_TYPES[target.name]).view(f"u{target.primitive_bitwidth // 8}")

    def create_fma(self, x, y, z):
        result = fma(*np.broadcast_arrays(x.data, y.data, z.data))
        return interpreter.TensorHandle(result, z.dtype.scalar)

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    to_tensor = TritonSemantic.to_tensor

    def to_tensor_of_constexpr(self, x, *args, **kwargs):
        return to_tensor(self, x.value if isinstance(x, tl.constexpr) else x, *args, **kwargs)

    monkeypatch.setattr(TritonSemantic, "to_tensor", to_tensor_of_constexpr)
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


def to_torch(array):
    array = np.ascontiguousarray(array)
    name = array.dtype.name
    if name in ("float8_e4m3fn", "bfloat16"):
        return torch.from_numpy(bits(array).copy()).view(getattr(torch, name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor):
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("float8_e4m3fn", "bfloat16"):
        raw = tensor.view(torch.uint8 if name == "float8_e4m3fn" else torch.uint16)
        return raw.numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()


def run(launch):
    return [to_numpy(out) for out in launch_torch(launch)]


def route(logits, bias, factor, config):
    factor = torch.tensor(factor, dtype=torch.float32)
    bias = None if bias is None else to_torch(bias)
    return run(routing.launch(to_torch(logits), bias, factor, **config.routing_options))


def plan_of(topk_ids, offset, num_local_experts, num_experts, block_m):
    sizes = {"num_local_experts": num_local_experts, "num_experts": num_experts}
    arrays = (to_torch(topk_ids), torch.tensor(offset, dtype=torch.int32))
    counts = None
    if not plan_kernels.is_counted_by_all(*topk_ids.shape):
        (counts,) = launch_torch(plan_kernels.count_launch(*arrays, **sizes))
    return GroupPlan(*run(plan_kernels.plan_launch(*arrays, counts, block_m=block_m, **sizes)))
