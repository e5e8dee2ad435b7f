"""The Triton glue of the `deepgemm` solution in Triton's interpreter, with a plain grouped matmul.

Run as a program: the interpreter is chosen by TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import os
import sys

import torch

from interop import torch_oracle
from interop.solutions import deepgemm
from jax_moe import DEEPSEEK_V3, MoEConfig
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


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    check(33, 64)
    check(9, 128, hidden_size=384, intermediate_size=256)
    check(33, 64, MoEConfig(8), num_experts=96, num_local_experts=12, offset=24)
    check(33, 64, MoEConfig(4, scoring="softmax"), num_experts=48, num_local_experts=48, offset=0)
