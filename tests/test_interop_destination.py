"""`out=`: where a caller wants the result."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from interop import destination, torch_moe  # noqa: E402
from tests.torch_inputs import bits, torch_inputs  # noqa: E402


@pytest.fixture(scope="module")
def inputs():
    return torch_inputs(20)


@pytest.fixture(scope="module")
def expected(inputs):
    return torch_moe(*inputs.arguments)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.zeros(20, 256), TypeError),
        (torch.zeros(19, 256, dtype=torch.bfloat16), ValueError),
        (torch.zeros(20, 256, dtype=torch.bfloat16, device="meta"), ValueError),
    ],
    ids=["dtype", "shape", "device"],
)
def test_bad_destinations_are_named(inputs, out, error):
    with pytest.raises(error, match=r"out: expected bfloat16 \[20, 256\] on cpu, got torch\."):
        torch_moe(*inputs.arguments, out=out)


def test_a_destination_whose_elements_share_memory_is_named(inputs):
    out = torch.zeros(1, 256, dtype=torch.bfloat16).expand(20, 256)
    with pytest.raises(ValueError, match="out: expected memory of its own for each element"):
        torch_moe(*inputs.arguments, out=out)
    with pytest.raises(ValueError, match="out: expected a tensor with memory, got Uninitialized"):
        torch_moe(*inputs.arguments, out=torch.nn.UninitializedBuffer())
    over_each_other = torch.zeros(300, dtype=torch.bfloat16).as_strided((20, 256), (1, 1))
    with pytest.raises(ValueError, match=r"out: expected memory of its own .* strides \[1, 1\]"):
        torch_moe(*inputs.arguments, out=over_each_other)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", ["sparse", "sparse_csr"])
def test_a_sparse_destination_is_named(inputs, kind):
    out = getattr(torch.zeros(20, 256, dtype=torch.bfloat16), f"to_{kind}")()
    with pytest.raises(ValueError, match=r"out: expected a dense tensor, got layout torch\.sparse"):
        torch_moe(*inputs.arguments, out=out)


@pytest.mark.parametrize("held", [0, 512, 20 * 256 * 2 - 1])
def test_a_destination_without_memory_for_its_elements_is_named(inputs, held):
    """FSDP frees a storage and keeps its tensor: to write there would end the process, or worse."""
    out = torch.zeros(20, 256, dtype=torch.bfloat16)
    out.untyped_storage().resize_(held)
    with pytest.raises(ValueError, match=r"^out: expected a (tensor with mem|storage of 10240)"):
        torch_moe(*inputs.arguments, out=out)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_destination_is_named(inputs):
    parts = [torch.ones(2, 256), torch.ones(3, 256)]
    for out in (torch.nested.nested_tensor(parts, layout=one) for one in (None, torch.jagged)):
        with pytest.raises(ValueError, match=r"^out: expected a dense tensor, got a nested"):
            torch_moe(*inputs.arguments, out=out)


def test_a_destination_of_inference_mode_is_written_in_that_mode_only(inputs, expected):
    with torch.inference_mode():
        out = torch.zeros(20, 256, dtype=torch.bfloat16)
        torch_moe(*inputs.arguments, out=out)
    np.testing.assert_array_equal(bits(out), bits(expected))
    with pytest.raises(ValueError, match="out: expected a tensor that torch lets be changed here"):
        torch_moe(*inputs.arguments, out=out)


def test_strides_of_any_kind_are_no_overlap():
    whole = torch.zeros(40, 512, dtype=torch.bfloat16)
    for out in (whole[::2, ::2], whole[:20, :256], torch.zeros(256, 20, dtype=torch.bfloat16).T):
        destination.check(out, (20, 256), out.device)
