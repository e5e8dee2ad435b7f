"""sglang-kernel's operators in plain PyTorch, by their documented meaning and argument order."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interop import torch_definition as definition


def moe_fused_gate(logits, bias, n_group, topk_group, top_k, shared, factor, scale_output):
    assert (n_group, topk_group, top_k, shared, scale_output) == (8, 4, 8, 0, False)
    assert logits.dtype == bias.dtype == torch.float32
    ids, weights = definition.route(logits, bias, 1.0)
    return [weights, ids.to(torch.int32)]


def prepare_moe_input(ids, offsets, blockscale, problems1, problems2, source, place, e, n, k):
    assert blockscale is None
    assert ids.dtype == torch.int32
    flat = ids.flatten().long()
    counts = flat.bincount(minlength=e)
    offsets.copy_(torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]))
    problems1.copy_(torch.stack([counts, torch.full_like(counts, 2 * n), counts * 0 + k], dim=1))
    problems2.copy_(torch.stack([counts, torch.full_like(counts, k), counts * 0 + n], dim=1))
    order = flat.argsort(stable=True)
    source.copy_(order // ids.shape[1])
    place[order] = torch.arange(len(flat), dtype=torch.int32)


def shuffle_rows(x, source, out):
    assert x.is_contiguous()
    assert out.shape == (len(source), x.shape[1])
    out.view(torch.uint8).copy_(x.view(torch.uint8)[source.long()])


def silu_and_mul(out, x):
    gate, up = x.float().chunk(2, dim=1)
    out.copy_(gate * torch.sigmoid(gate) * up)


def sgl_per_token_group_quant_8bit(x, values, scales, group, floor, low, high, ue8m0):
    assert (group, floor, low, high, ue8m0) == (128, 1e-10, -448.0, 448.0, False)
    blocks = x.float().view(len(x), -1, 128)
    scales.copy_(blocks.abs().amax(dim=2).clamp(min=floor) / 448.0)
    values.copy_((blocks / scales[:, :, None]).clamp(low, high).view(x.shape))


def fp8_blockwise_scaled_grouped_mm(
    out, a_ptrs, b_ptrs, out_ptrs, a_scale_ptrs, b_scale_ptrs, a, b, a_scale, b_scale,
    stride_a, stride_b, stride_c, layout_a, layout_b, problems, offsets, workspace,
):  # fmt: skip
    e, k, n = b.shape
    pointers = (a_ptrs, b_ptrs, out_ptrs, a_scale_ptrs, b_scale_ptrs)
    assert all(p.shape == (e,) and p.dtype == torch.int64 for p in pointers)
    assert layout_a.shape == layout_b.shape == (e, 5)
    assert stride_a.tolist() == stride_b.tolist() == [k] * e
    assert stride_c.tolist() == [n] * e
    assert workspace.dtype == torch.uint8
    assert b.stride(1) == b_scale.stride(1) == 1, "weights are passed as transposed views"
    rows = a.float().view(len(a), -1, 128) * a_scale[:, :, None]
    for expert, (count, columns, depth) in enumerate(problems.tolist()):
        assert (columns, depth) == (n, k)
        start = int(offsets[expert])
        weight = definition.dequantize(b[expert].t(), b_scale[expert].t())
        out[start : start + count] = rows[start : start + count].flatten(1) @ weight.t()


def apply_shuffle_mul_sum(rows, out, place, factors):
    assert factors.dtype == out.dtype == torch.bfloat16
    gathered = rows[place.long()].view(*factors.shape, -1).float()
    out.copy_((gathered * factors.float()[:, :, None]).sum(dim=1))


class FillCounter(TorchDispatchMode):
    """Lists the calls that set a whole tensor to one number; on a GPU each is a kernel.

    What happens inside the operators of `ops` is left out.
    """

    FILLS = ("full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "fill_", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.fills: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._inside = False
        self.ops = SimpleNamespace(
            **{name: SimpleNamespace(default=self._hidden(op)) for name, op in vars(OPS).items()}
        )

    def _hidden(self, op):
        def call(*args):
            self._inside = True
            try:
                return op.default(*args)
            finally:
                self._inside = False

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # torch.where and other composites make a tensor of a number with scalar_tensor.
        if not self._inside and name in (*self.FILLS, "scalar_tensor"):
            self.fills.append((tuple(found.shape), found.dtype))
        return found


OPS = SimpleNamespace(
    **{
        function.__name__: SimpleNamespace(default=function)
        for function in (
            moe_fused_gate,
            prepare_moe_input,
            shuffle_rows,
            silu_and_mul,
            sgl_per_token_group_quant_8bit,
            fp8_blockwise_scaled_grouped_mm,
            apply_shuffle_mul_sum,
        )
    }
)
