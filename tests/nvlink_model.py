"""The kernels between GPUs without GPUs: two models of them.

`Machine` runs the kernels' own Python on NumPy arrays, a thread per block of every rank: which
slots they write, which rows they read, how they end. `Poisoned` is what they do, written down
once more with collectives, so that whole layers run on CPU devices. In both, what is not sent is
poison: NaN, or bytes that no input has.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jax_moe.parallel import exchange
from jax_moe.parallel.collectives import add_in_order, gather, send_home
from jax_moe.parallel.nvlink import NVLink
from jax_moe.parallel.tokens import Tokens
from jax_moe.types import Routing
from pallas_kernels.mosaic import combine, dispatch, peers

AXIS = "expert"
SECONDS = 20.0


class Poisoned(NVLink):
    """The kernels' effect, with NaN wherever they would send nothing."""

    def dispatch(self, tokens: Tokens) -> Tokens:
        everything = gather(tokens, self.ranks.axes)
        ids, weights = everything.routing
        here = self._goes_to(ids, self.ranks.index())
        poison = jnp.asarray(jnp.nan, everything.hidden_states.dtype)
        return Tokens(
            jnp.where(here[:, None], everything.hidden_states, poison),
            jnp.where(here, everything.hidden_states_scale, jnp.nan),
            Routing(ids, jnp.where(here[:, None], weights, jnp.nan)),
        )

    def combine(self, partial_sums: Array, sent: Array, received: Array) -> Array:
        here = self._goes_to(received, self.ranks.index())
        left = jnp.where(here[:, None], partial_sums, jnp.asarray(jnp.nan, partial_sums.dtype))
        found = send_home(left, self.ranks.axes, self.ranks.count)
        needed = jnp.stack([self._goes_to(sent, rank) for rank in range(self.ranks.count)])
        return add_in_order(jnp.where(needed[:, :, None], found, 0))

    def _goes_to(self, ids: Array, rank: Any) -> Array:
        return ((ids >= 0) & (ids // self.num_local_experts == rank)).any(axis=1)


def use_poisoned(patch: pytest.MonkeyPatch) -> None:
    """Makes `exchange="nvlink"` the model, on any device."""
    model = exchange._Kind(Poisoned, lambda place: None, "a model")
    patch.setitem(exchange._KINDS, "nvlink", model)


class Ref:
    """A reference in the memory of one rank."""

    def __init__(self, array: np.ndarray, name: int, rank: int, machine: Machine):
        self.array, self.name, self.rank, self.machine = array, name, rank, machine

    @property
    def at(self) -> Ref:
        return self

    def __getitem__(self, index: Any) -> Any:
        found = self.array[index]
        return found if np.isscalar(found) else Ref(found, self.name, self.rank, self.machine)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[index] = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype


class Machine:
    """N ranks that run one kernel together.

    Attributes:
        outputs: Of each rank, poisoned where nothing was written.
        signals: What each rank's semaphore holds at the end.
        log: (rank, block, what) in their order: "access" to a peer's memory, "signal", "wait".
        blocks: Of each rank's grid.
    """

    def __init__(self, num_ranks: int, seed: int = 0):
        self.num_ranks = num_ranks
        self.order = np.random.default_rng(seed)
        self.signals = [0] * num_ranks
        self.changed = threading.Condition()
        self.here = threading.local()
        self.log: list[tuple[int, int, str]] = []
        self.memory: list[list[Ref]] = []
        self.outputs: list[list[np.ndarray]] = []
        self.blocks = 0
        self.launched: Any = None

    def run(self, patch: pytest.MonkeyPatch, kernel: Callable[..., Any], inputs: Any) -> None:
        """Runs it: `inputs` are each rank's arguments."""
        self._pretend(patch)
        bodies = []
        for rank, arguments in enumerate(inputs):
            kernel(*arguments)
            body, arrays, outputs, self.blocks = self.launched
            self.outputs.append([_poison(output) for output in outputs])
            refs = [*map(np.asarray, arrays), *self.outputs[-1]]
            self.memory.append([Ref(a, i, rank, self) for i, a in enumerate(refs)])
            bodies.append(body)
        places = [(r, b) for r in range(self.num_ranks) for b in range(self.blocks)]
        self.order.shuffle(places)
        problems: list[BaseException] = []

        def block(rank: int, number: int) -> None:
            self.here.rank, self.here.block = rank, number
            try:
                bodies[rank](*self.memory[rank])
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=block, args=place, daemon=True) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), "a block waits for ever"
        if problems:
            raise problems[0]

    def _pretend(self, patch: pytest.MonkeyPatch) -> None:
        lax = SimpleNamespace(
            axis_size=lambda axis: self.num_ranks,
            axis_index=lambda axis: self.here.rank if axis == AXIS else self.here.block,
            rem=lambda a, b: a % b,
            div=lambda a, b: int(a / b),  # as C does, towards zero
            cond=lambda condition, yes, no: yes() if condition else no(),
        )
        pallas = SimpleNamespace(
            loop=lambda start, stop: lambda body: [body(i) for i in range(start, stop)],
            when=lambda condition: lambda body: body() if condition else None,
            ds=lambda start, size: slice(start, start + size),
            get_global=lambda kind: "semaphore",
            semaphore_signal=self._signal,
            semaphore_wait=self._wait,
        )
        gpu = SimpleNamespace(
            SemaphoreType=SimpleNamespace(REGULAR=None),
            remote_ref=self._remote_ref,
            layout_cast=lambda array, layout: array,
        )
        numpy = SimpleNamespace(
            zeros=np.zeros, float32=np.float32, int32=int, logical_or=np.logical_or
        )
        for module in (dispatch, combine, peers):
            patch.setattr(module, "lax", lax)
            patch.setattr(module, "pl", pallas)
            patch.setattr(module, "plgpu", gpu)
            patch.setattr(module, "jnp", numpy, raising=False)
            patch.setattr(module, "launch", SimpleNamespace(kernel=self._described), raising=False)
        for width in ("bytes", "words"):
            patch.setattr(peers, f"load_{width}", lambda ref: ref.array.copy())
            patch.setattr(peers, f"store_{width}", lambda ref, values: ref.__setitem__(..., values))
        patch.setattr(peers, "load_columns", lambda ref, columns, vector: ref.array.copy())
        patch.setattr(peers, "columns_layout", lambda columns, vector: None)

    def _described(self, body: Any, *, out_type: Any, grid: Any, **_: Any) -> Any:
        """Instead of a kernel, what it would be run with."""
        outputs = out_type if isinstance(out_type, tuple) else (out_type,)

        def call(*inputs: Any) -> Any:
            self.launched = body, inputs, outputs, grid[0]
            return outputs

        return call

    def _remote_ref(self, ref: Ref, place: dict[str, int]) -> Ref:
        self._note("access")
        return self.memory[place[AXIS]][ref.name]

    def _note(self, what: str) -> None:
        self.log.append((self.here.rank, self.here.block, what))

    def _signal(self, semaphore: str, device_id: dict[str, int]) -> None:
        with self.changed:
            self._note("signal")
            self.signals[device_id[AXIS]] += 1
            self.changed.notify_all()

    def _wait(self, semaphore: str, count: int, decrement: bool) -> None:
        assert not decrement
        rank = self.here.rank
        self._note("wait")
        with self.changed:
            assert self.changed.wait_for(lambda: self.signals[rank] >= count, SECONDS)


def _poison(output: Any) -> np.ndarray:
    array = np.empty(output.shape, output.dtype)
    array.view(np.uint8)[...] = 0xA5
    return array


def run(
    machine: Machine, patch: pytest.MonkeyPatch, kernel: Any, inputs: Any, num_local_experts: int
) -> None:
    """Runs `dispatch` or `combine` on each rank's arguments."""
    call = functools.partial(kernel, axis_name=AXIS, num_local_experts=num_local_experts)
    machine.run(patch, call, inputs)
