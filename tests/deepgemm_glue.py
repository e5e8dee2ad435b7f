"""The Triton glue of the peers in Triton's interpreter, with PyTorch for their own kernels.

Run as a program: the interpreter is chosen by TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch

from interop import torch_oracle
from interop.solutions import deepgemm, deepgemm_mega, flashinfer_cutlass
from jax_moe import DEEPSEEK_V3, MoEConfig
from pallas_kernels import interruption
from tests.torch_inputs import relative_error, torch_inputs


def grouped_matmul(a, weights, ends, align: int) -> torch.Tensor:
    """What DeepGEMM computes for its psum layout; rows that belong to no expert are NaN."""
    values, scales = a
    rows = values.float().view(len(values), -1, 128) * scales.t()[:, :, None]
    out = torch.full((len(values), weights[0].shape[1]), float("nan"))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        weight = torch_oracle.dequantize(weights[0][expert], weights[1][expert])
        out[start:end] = rows[start:end].flatten(1) @ weight.t()
        start = -(-end // align) * align
    return out.bfloat16()


def check(num_tokens: int, align: int, config: MoEConfig = DEEPSEEK_V3, **sizes: int) -> None:
    """Each stage, and the layer, against the oracle in PyTorch."""
    inputs = torch_inputs(num_tokens, **sizes)
    logits, bias, hidden, hidden_scale, w13, s13, w2, s2, offset, factor = inputs.arguments
    routing = deepgemm.route(logits, bias, offset, factor, w13.shape[0], config)
    pair_expert, _, weights, counts = routing
    options = config.routing_options
    ids, expected_weights = torch_oracle.route(logits, bias, factor, **options)
    local = torch.where((ids >= offset) & (ids < offset + w13.shape[0]), ids - offset, -1)
    assert torch.equal(pair_expert.long(), local)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)
    assert torch.equal(counts.long(), local[local >= 0].bincount(minlength=w13.shape[0]))

    rows, row_scale, pair_row, ends = deepgemm.gather(hidden, hidden_scale, routing, align)
    assert torch.equal(pair_row >= 0, local >= 0)
    taken = pair_row[pair_row >= 0].long()
    assert len(taken.unique()) == len(taken)
    tokens = torch.arange(num_tokens)[:, None].expand_as(pair_row)[pair_row >= 0]
    assert torch.equal(rows[taken].view(torch.uint8), hidden[tokens].view(torch.uint8))
    assert torch.equal(row_scale[:, taken], hidden_scale[:, tokens])
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), -(-ends[:-1] // align) * align])
    assert torch.equal(ends - starts, counts)
    assert torch.equal((taken >= starts[local[local >= 0]]), torch.ones_like(taken, dtype=bool))

    gemm1 = grouped_matmul((rows, row_scale), (w13, s13), ends, align)
    activations = deepgemm.swiglu_quantize(gemm1, ends, align)
    half = w2.shape[2]
    up, gate = gemm1[taken, :half].float(), gemm1[taken, half:].float()
    hidden_rows = (gate * torch.sigmoid(gate) * up).view(len(taken), -1, 128)
    scales = activations[1].t()[taken]
    torch.testing.assert_close(scales, hidden_rows.abs().amax(dim=2) / 448, rtol=1e-6, atol=0)
    # The interpreter rounds an e4m3 up to the next power of two wrongly (127.9 to 64): compare
    # what is far from one.
    found = activations[0][taken].float().view(hidden_rows.shape)
    exact = hidden_rows / scales[:, :, None]
    carried = torch.frexp(exact).mantissa.abs() > 0.96
    torch.testing.assert_close(found[~carried], exact[~carried], rtol=0.0626, atol=2**-9)

    gemm2 = grouped_matmul(activations, (w2, s2), ends, align)
    out = deepgemm.unpermute(gemm2, weights, pair_row)
    summed = torch.zeros(num_tokens, gemm2.shape[1])
    for row, weight in zip(pair_row.t(), weights.t(), strict=True):
        summed[row >= 0] += gemm2[row[row >= 0].long()].float() * weight[row >= 0, None]
    # One bf16 step, as the interpreter's cast cuts bits off where a GPU rounds them.
    torch.testing.assert_close(out.float(), summed, rtol=2**-7, atol=0)
    expected = torch_oracle.layer(*inputs.arguments, **options)
    assert torch.equal(out[(local < 0).all(dim=1)], expected[(local < 0).all(dim=1)])
    error = relative_error(out, expected)
    assert error < 0.08, error
    print(f"T={num_tokens} align={align} relative error {error:.4f}")


class FusedLayer:
    """`fp8_mega_moe` of one rank in PyTorch, by what its sources say of layouts and of zeroes."""

    ALIGNMENT = 384

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._C = SimpleNamespace(
            get_token_alignment_for_mega_moe=lambda: self.ALIGNMENT,
            get_symm_buffer_size_for_sm90_mega_moe=self.size,
        )

    def size(self, ranks, experts, tokens, top_k, hidden, intermediate, fp8_dispatch, activation):
        """Counters, then activations, scales, ids and weights; what follows is the kernel's own."""
        assert (ranks, fp8_dispatch, activation) == (1, True, "swiglu")
        assert tokens % self.ALIGNMENT == 0
        dtypes = torch.float8_e4m3fn, torch.float32, torch.int64, torch.float32
        shapes = (tokens, hidden), (tokens, hidden // 128), (tokens, top_k), (tokens, top_k)
        sizes = [
            rows * row * dtype.itemsize for (rows, row), dtype in zip(shapes, dtypes, strict=True)
        ]

        def views(buffer):
            parts = buffer[64 : 64 + sum(sizes)].split(sizes)
            found = zip(parts, dtypes, shapes, strict=True)
            return (*(part.view(dtype).view(shape) for part, dtype, shape in found), *[None] * 4)

        return 64 + sum(sizes) + 1024, views

    def transform_weights_for_mega_moe_sm90(self, first, second):
        """Rows of gate and up in turn, eight of each; scales stay."""
        experts, rows, row = first[0].shape
        halves = first[0].view(torch.uint8).view(experts, 2, rows // 16, 8, row)
        mixed = halves.transpose(1, 2).reshape(first[0].shape).view(torch.float8_e4m3fn)
        return (mixed, first[1]), second

    def set_pdl(self, on: bool) -> None:
        self.calls.append(f"pdl {on}")

    def fp8_mega_moe(self, y, first, second, buffer) -> None:
        """The layer; the first bytes of the buffer stay zero between calls."""
        self.calls.append("layer")
        assert not buffer.buffer[:64].any()
        assert buffer.handle.buffer_ptrs == [buffer.buffer.data_ptr()]
        assert (buffer.group.rank(), buffer.group.size()) == (0, 1)
        tokens, hidden = y.shape
        assert tokens <= buffer.num_max_tokens_per_rank
        experts, rows, _ = first[0].shape
        assert experts == buffer.num_experts
        x = buffer.words[:tokens].view(torch.float8_e4m3fn).float().view(tokens, -1, 128)
        x = (x * buffer.scales[:tokens, :, None]).flatten(1)
        total = torch.zeros(tokens, hidden)
        mixed = first[0].view(torch.uint8).view(experts, rows // 16, 2, 8, hidden)
        straight = mixed.transpose(1, 2).reshape(first[0].shape).view(torch.float8_e4m3fn)
        for token, slot in (buffer.ids[:tokens] >= 0).nonzero().tolist():
            expert = buffer.ids[token, slot]
            gate, up = (
                torch_oracle.dequantize(straight[expert], first[1][expert]) @ x[token]
            ).chunk(2)
            part = torch.nn.functional.silu(gate) * up * buffer.topk_weights[token, slot]
            down = torch_oracle.dequantize(second[0][expert], second[1][expert])
            total[token] += (down @ part).bfloat16().float()
        y.copy_(total)


def check_mega(num_tokens: int) -> None:
    """The fused layer's staging, twice with one buffer, against the oracle in PyTorch."""
    package = FusedLayer()
    sys.modules["deep_gemm"] = package
    inputs = torch_inputs(num_tokens)
    prepared = deepgemm_mega.prepare(inputs)
    for _ in range(2):
        out = deepgemm_mega.run(*prepared)
    assert package.calls == ["pdl False", "layer"] * 2
    expected = torch_oracle.layer(*inputs.arguments)
    assert torch.equal(out[~expected.any(dim=1)], expected[~expected.any(dim=1)])
    error = relative_error(out, expected)
    assert error < 0.005, error  # nothing is quantized in between
    print(f"mega T={num_tokens} relative error {error:.4f}")


def fused_moe(
    x, ids, topk_weights, first, second, dtype, scales, *, ep_size, ep_rank, output,
    use_deepseek_fp8_block_scale,
):  # fmt: skip
    """flashinfer's `cutlass_fused_moe` of one rank in PyTorch, up before gate."""
    assert (x.dtype, dtype, ids.dtype) == (torch.bfloat16, torch.bfloat16, torch.int32)
    assert (ep_size, ep_rank, use_deepseek_fp8_block_scale) == (8, 0, True)
    total = torch.zeros(x.shape)
    for token, slot in (ids >= 0).nonzero().tolist():
        expert = ids[token, slot]
        assert expert < len(first)
        hidden = torch_oracle.dequantize(first[expert], scales[0][expert]) @ x[token].float()
        up, gate = hidden.chunk(2)
        down = torch_oracle.dequantize(second[expert], scales[1][expert])
        part = down @ (torch.nn.functional.silu(gate) * up)
        total[token] += part * topk_weights[token, slot]
    output.copy_(total)


def check_flashinfer(num_tokens: int) -> None:
    """What flashinfer's kernels are given, against the oracle in PyTorch."""
    sys.modules["flashinfer"] = SimpleNamespace()
    sys.modules["flashinfer.fused_moe"] = SimpleNamespace(cutlass_fused_moe=fused_moe)
    inputs = torch_inputs(num_tokens)
    out = flashinfer_cutlass.run(*flashinfer_cutlass.prepare(inputs))
    expected = torch_oracle.layer(*inputs.arguments)
    assert torch.equal(out[~expected.any(dim=1)], expected[~expected.any(dim=1)])
    error = relative_error(out, expected)
    assert error < 0.01, error  # bf16 hidden states
    print(f"flashinfer T={num_tokens} relative error {error:.4f}")


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    check(33, 64)
    check(9, 128, hidden_size=384, intermediate_size=256)
    check(33, 64, MoEConfig(8), num_experts=96, num_local_experts=12, offset=24)
    check(33, 64, MoEConfig(4, scoring="softmax"), num_experts=48, num_local_experts=48, offset=0)
    check_mega(33)
    check_flashinfer(33)


if __name__ == "__main__":
    interruption.exit_with(main)
