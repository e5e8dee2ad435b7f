"""The bridge on a CPU: what is shared, what is copied, what is refused, and that nothing leaks."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import resource
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from interop import dlpack, to_jax, to_torch  # noqa: E402
from tests import moe_inputs, torch_inputs  # noqa: E402

ZERO_COPY = [dtype for dtype in dlpack.DTYPES if dtype != torch.int64]


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 100).to(dtype)


@pytest.mark.parametrize("dtype", ZERO_COPY, ids=str)
@pytest.mark.parametrize("shape", [(16, 256), (64,), ()], ids=str)
def test_both_directions_share_memory_and_bits(dtype, shape):
    tensor = sample(dtype, *shape)
    array = to_jax(tensor)
    assert array.shape == tensor.shape
    assert array.dtype == np.dtype(dlpack.DTYPES[dtype])
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    np.testing.assert_array_equal(
        moe_inputs.bits(array).ravel().view(np.uint8),
        torch_inputs.bits(tensor.reshape(-1)).ravel(),
    )


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)], ids=str)
def test_empty(shape):
    array = to_jax(torch.empty(shape, dtype=torch.bfloat16))
    assert array.shape == shape
    assert array.dtype == jnp.bfloat16
    back = to_torch(array)
    assert back.shape == shape
    assert back.dtype == torch.bfloat16


def misaligned() -> torch.Tensor:
    return torch.arange(65, dtype=torch.float32)[1:]


COPIED = {
    "transposed": lambda: sample(torch.float32, 8, 16).t(),
    "strided": lambda: sample(torch.float8_e4m3fn, 8, 64)[:, ::2],
    "column slice": lambda: sample(torch.bfloat16, 8, 64)[:, :32],
    "expanded": lambda: sample(torch.float32, 1, 64).expand(8, 64),
    "misaligned": misaligned,
    "negative bit": lambda: torch.complex(misaligned(), misaligned()).conj().imag,
    "negative bit, else as it should be": lambda: torch._neg_view(torch.arange(64.0)),
}


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_what_cannot_be_shared_is_copied_once(make):
    tensor = make()
    expected = tensor.resolve_neg().float().numpy().copy()
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() != tensor.data_ptr()
    assert array.unsafe_buffer_pointer() % dlpack.ALIGNMENT["cpu"] == 0
    np.testing.assert_array_equal(np.asarray(array, np.float32), expected)


def test_one_quick_look_is_enough_for_a_tensor_that_crosses_as_it_is(monkeypatch):
    def looks_closely(bridge, tensor, name, beside):
        raise AssertionError(name)

    monkeypatch.setattr(dlpack.Bridge, "_made_ready", looks_closely)
    assert to_jax(torch.ones(64), "x").shape == (64,)
    with pytest.raises(AssertionError, match="y"):
        to_jax(misaligned(), "y")


REFUSED = {
    "meta": (lambda: torch.empty(2, device="meta"), "device meta"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "requires grad": (lambda: torch.ones(2, requires_grad=True), "requires grad"),
    "float64": (lambda: torch.ones(2, dtype=torch.float64), "float64"),
    "e5m2": (lambda: torch.ones(2).to(torch.float8_e5m2), "float8_e5m2"),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), "bool"),
    "complex, conjugate bit": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "complex64"),
    "int64": (
        lambda: torch.tensor(2**40),
        "expected int32, got torch.int64, which needs JAX_ENABLE_X64",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_cross_is_named(make, reason):
    with pytest.raises(ValueError, match=f"^router: .*{reason}"):
        to_jax(make(), "router")


def freed(tensor: torch.Tensor, nbytes: int = 0) -> torch.Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(64)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])


NO_MEMORY = {
    "freed": (lambda: freed(torch.ones(64)), "with memory, got a null pointer"),
    "freed, transposed": (lambda: freed(torch.ones(8, 8).t()), "got a null pointer"),
    "zeros without memory": (lambda: torch._efficientzerotensor(64), "got a null pointer"),
    "fake": (fake, "got a null pointer"),
    "shrunk": (lambda: freed(torch.ones(64), 192), "storage of 256 bytes or more, got 192 bytes"),
    "shrunk, transposed": (lambda: freed(torch.ones(8, 8).t(), 252), "256 bytes .* got 252 bytes"),
    "shrunk, strided": (lambda: freed(torch.ones(8, 8)[:, ::2], 248), "252 bytes .* got 248 bytes"),
    "shrunk, a part": (lambda: freed(torch.ones(64)[16:48], 188), "192 bytes .* got 188 bytes"),
    "lazy": (torch.nn.parameter.UninitializedBuffer, "with memory, got UninitializedBuffer"),
    "lazy parameter": (
        lambda: torch.nn.parameter.UninitializedParameter(requires_grad=False),
        "with memory, got UninitializedParameter",
    ),
    "nested": (nested, "expected a dense tensor, got a nested tensor"),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("make", "reason"), NO_MEMORY.values(), ids=NO_MEMORY)
def test_a_tensor_without_its_memory_is_named(make, reason):
    with pytest.raises(ValueError, match=f"^router: .*{reason}"):
        to_jax(make(), "router")


def test_what_a_shrunk_storage_still_holds_crosses():
    assert to_jax(freed(torch.ones(64), 128)[:32]).tolist() == [1.0] * 32
    assert to_jax(freed(torch.ones(4, 0))).shape == (4, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in make_dual
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_a_dual_tensor_is_named_and_others_cross(mode):
    plain = torch.ones(64)
    with forward_ad.dual_level(), mode():
        dual = forward_ad.make_dual(torch.ones(64), plain)
        with pytest.raises(ValueError, match=r"^x: .* without a tangent .* got a dual tensor"):
            to_jax(dual, "x")
        primal = forward_ad.unpack_dual(dual).primal
        for tensor in (primal, plain):
            assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in jvp
@pytest.mark.parametrize(
    "transform",
    [torch.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), torch.func.functionalize],
    ids=["vmap", "jvp", "functionalize"],
)
def test_inside_torch_func_wrapped_tensors_are_named_and_others_cross(transform):
    captured = torch.ones(64)

    def function(x: torch.Tensor) -> torch.Tensor:
        assert to_jax(captured).unsafe_buffer_pointer() == captured.data_ptr()
        with pytest.raises(ValueError, match=r"^x: expected a tensor with"):
            to_jax(x, "x")
        return x.sin()

    transform(function)(torch.ones(2, 64))


def test_only_optional_tensors_may_be_none():
    bridge = dlpack.bridge_of(torch.ones(2), "x")
    arrays = bridge.import_all({"x": torch.ones(2), "y": None}, None, ("y",))
    assert arrays["x"].shape == (2,)
    assert arrays["y"] is None
    with pytest.raises(TypeError, match=r"^x: expected a torch\.Tensor, got NoneType"):
        bridge.import_all({"x": None, "y": None}, None, ("y",))


def test_a_tensor_elsewhere_is_named():
    bridge = dlpack.bridge_of(torch.ones(2), "x")
    with pytest.raises(ValueError, match=r"^y: expected a tensor on cpu, where x is, got meta"):
        bridge.import_all({"x": torch.ones(2), "y": torch.ones(2, device="meta")}, None)


def test_one_event_serves_the_arrays_of_a_program(monkeypatch):
    bridge = dlpack.Bridge(torch.device("cpu"), "x")
    monkeypatch.setattr(bridge, "order_after_torch", lambda stream: 0xABC)
    monkeypatch.setattr(dlpack, "_to_buffer", lambda capsule, target, address, copy, kind: address)
    tensors = {"x": torch.ones(2), "y": torch.ones(2), "z": None}
    each = {"x": 0xABC, "y": 0xABC, "z": None}
    assert bridge.import_all(tensors, None, ("z",)) == each
    assert bridge.import_all(tensors, None, ("z",), "y") == each | {"x": None}
    with jax.disable_jit():  # then every operation is a program
        assert bridge.import_all(tensors, None, ("z",), "y") == each


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_grad_mode_is_off_there_is_no_gradient_to_lose(mode):
    parameter = torch.nn.Parameter(torch.arange(64.0))
    with pytest.raises(ValueError, match=r"^w: requires grad.*w\.detach\(\).*torch\.no_grad\(\)"):
        to_jax(parameter, "w")
    with mode():
        array = to_jax(parameter, "w")
        assert array.unsafe_buffer_pointer() == parameter.data_ptr()
        assert to_jax(parameter.view(8, 8).t(), "w").shape == (8, 8)
        assert to_jax(torch.ones(64) * 2).tolist() == [2.0] * 64  # an inference tensor
    with torch.no_grad():
        parameter.mul_(2)
    assert array.tolist() == (2 * torch.arange(64.0)).tolist()


class OneEvent:
    """What `Bridge` needs of an event and a stream; notes what was waited for."""

    def __init__(self):
        self.recorded = None
        self.waited = []

    def record(self, stream):
        self.recorded = stream
        time.sleep(1e-4)  # another thread may come between

    def wait_event(self, event):
        self.waited.append((threading.get_ident(), event.recorded))


def test_threads_wait_for_their_own_stream():
    """All calls share one event: no thread may wait for what another one recorded."""
    bridge = dlpack.Bridge(torch.device("cpu"), "x")
    bridge._event = bridge._stream = shared = OneEvent()
    bridge._address, bridge._lock = 0xABC, threading.Lock()

    def hand_over() -> None:
        for _ in range(20):
            assert bridge.order_after_torch(threading.get_ident()) == 0xABC

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(hand_over) for _ in range(4)]:
            done.result()
    assert len(shared.waited) == 80
    assert all(thread == recorded for thread, recorded in shared.waited)


def test_arrays_are_kept_until_torch_has_passed_them(monkeypatch):
    """In the order of their events: one that has happened waits for those before it."""
    monkeypatch.setattr(dlpack, "_in_flight", collections.deque())
    happened = {"a": False, "b": False}

    def keep(name):
        event = types.SimpleNamespace(query=lambda: happened[name])
        dlpack.keep_while_read(name, types.SimpleNamespace(record_event=lambda: event))
        return [array for _, array in dlpack._in_flight]

    dlpack.keep_while_read("on a CPU", None)
    assert not dlpack._in_flight
    assert keep("a") == ["a"]
    happened["b"] = True
    assert keep("b") == ["a", "b"]
    happened["a"] = True
    assert keep("b") == []


def test_int64_crosses_whole_where_jax_has_it():
    with jax.enable_x64(True):
        array = to_jax(torch.tensor([2**40, -1]))
        assert array.dtype == jnp.int64
        assert to_torch(array).tolist() == [2**40, -1]


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"^x: expected a torch\.Tensor, got ndarray"):
        to_jax(np.ones(2), "x")
    with pytest.raises(TypeError, match=r"^y: expected a jax\.Array, got list"):
        to_torch([1.0], "y")
    with pytest.raises(ValueError, match=r"^y: expected float8_e4m3fn or .* or int64, got bool"):
        to_torch(jnp.ones(2, bool), "y")
    with pytest.raises(
        ValueError, match=r"^y: expected an array with memory to share, got a traced"
    ):
        jax.jit(lambda y: to_torch(y, "y"))(jnp.ones(2))


@pytest.mark.parametrize("shape", [(2,), (0,)], ids=str)
def test_a_deleted_array_is_named(shape):
    array = jnp.ones(shape)
    array.delete()
    with pytest.raises(ValueError, match=r"^y: expected an array with memory, got a deleted"):
        to_torch(array, "y")


def test_a_device_that_jax_does_not_see_is_named():
    with pytest.raises(ValueError, match=r"^x: expected a device that JAX sees, got cuda:99"):
        dlpack.jax_device(torch.device("cuda:99"), "x")


def test_freeing_the_tensor_leaves_the_array_whole():
    tensor = torch.full((1024, 256), 3.0)
    array = to_jax(tensor)
    del tensor
    gc.collect()
    overwritten = [torch.full((1024, 256), 9.0) for _ in range(8)]
    assert float(array.min()) == float(array.max()) == 3.0
    assert len(overwritten) == 8


def give_other_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(3)


def set_other_storage(tensor: torch.Tensor) -> None:
    tensor.set_(torch.zeros(3))


def convert_module(tensor: torch.Tensor) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    tensor.data = module.double().weight.data.float()


@pytest.mark.parametrize("change", [give_other_data, set_other_storage, convert_module])
def test_another_storage_of_the_tensor_leaves_the_array_whole(change):
    tensor = torch.full((1 << 16,), 3.0)
    array = to_jax(tensor)
    storage = StorageWeakRef(tensor.untyped_storage())
    change(tensor)
    overwritten = [torch.full((1 << 16,), 9.0) for _ in range(8)]
    assert not storage.expired()
    assert float(array.min()) == float(array.max()) == 3.0
    assert len(overwritten) == 8
    del array
    # A computation lets its operands go a moment after its result is there, on a thread of XLA's.
    deadline = time.monotonic() + 20
    while not storage.expired() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert storage.expired()


def test_freeing_the_array_leaves_the_tensor_whole():
    array = jnp.full((1024, 256), 3.0) + 1
    tensor = to_torch(array)
    del array
    gc.collect()
    others = [jnp.full((1024, 256), 9.0).block_until_ready() for _ in range(8)]
    assert tensor.min() == tensor.max() == 4.0
    assert len(others) == 8


def test_writes_are_seen_on_the_other_side():
    tensor = torch.zeros(256)
    array = to_jax(tensor)
    tensor.fill_(5.0)
    np.testing.assert_array_equal(np.asarray(array), np.full(256, 5.0, np.float32))


def test_a_thousand_round_trips_leave_memory_flat():
    def round_trip() -> None:
        array = to_jax(torch.zeros(1 << 20, dtype=torch.uint8))
        assert to_torch(array).numel() == 1 << 20

    for _ in range(10):
        round_trip()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arrays = len(jax.live_arrays())
    for _ in range(1000):
        round_trip()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"grown by {grown} KiB over 1000 MiB of round trips"
    assert len(jax.live_arrays()) == arrays
