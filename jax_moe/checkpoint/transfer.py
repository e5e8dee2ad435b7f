"""Arrays of experts, read from files to devices.

On a CPU an array is read into its final memory, which JAX takes over. For a GPU it comes in slabs:

    file -> ring of host buffers (read by threads) -> slab on the device -> its place in the array

Reading, transfers and placing overlap; the host never holds more than the ring, and the device at
most the ring beside the arrays.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding

from jax_moe import transfers, validate
from jax_moe.checkpoint.reading import E4M3, Piece, Slab, Stack, aligned_empty, slabs_in_file_order
from jax_moe.transforms import is_tracing

SLAB_BYTES = 2**25
"""Large enough that the few microseconds of a transfer's start do not count."""
RING = 12
"""Slabs under way at a time."""
MAX_THREADS = 16

type Advance = Callable[[int], object]


class Share(NamedTuple):
    """The experts that some devices hold, all of them the same.

    Attributes:
        experts: The experts.
        devices: Where; None is the default device.
        memory_kind: Which memory of it, as shardings call that; None is its usual one.
    """

    experts: range
    devices: tuple[jax.Device | None, ...]
    memory_kind: str | None = None

    @property
    def shardings(self) -> list[Sharding | None]:
        """One per device."""
        return [
            device and SingleDeviceSharding(device, memory_kind=self.memory_kind)
            for device in self.devices
        ]


def num_threads_of(asked: Any) -> int:
    """Threads to read with: one per core within limits, as a read waits as often as it copies."""
    if asked is not None:
        return int(validate.integer("num_threads", asked, 1, 1024))
    return min(MAX_THREADS, max(4, len(os.sched_getaffinity(0))))


@contextmanager
def readers(
    nbytes: int, title: str, num_threads: int, progress: bool
) -> Iterator[tuple[ThreadPoolExecutor, Advance]]:
    """Threads to read with, and something to tell bytes to: a bar, or nothing.

    Args:
        nbytes: What will be read.
        title: Of the bar.
        num_threads: How many threads.
        progress: Whether there is a bar.

    Yields:
        Both.

    Raises:
        TypeError: `progress` is no bool.
        ImportError: There is to be a bar, and no tqdm.
        RuntimeError: JAX traces the caller.
    """
    progress = validate.boolean("progress", progress)
    if is_tracing():
        raise RuntimeError(
            "expected a call outside of jax.jit and the like, got one while JAX traces: files are "
            "not read when a program runs; load weights before, and pass them in"
        )
    with ExitStack() as stack:
        # A mesh that the caller has set would spread what is made here without a sharding.
        stack.enter_context(jax.set_mesh(None))
        pool = ThreadPoolExecutor(num_threads, "jax_moe.checkpoint")
        # Reads that have not begun are not begun any more once one has failed.
        stack.callback(pool.shutdown, cancel_futures=True)
        yield pool, stack.enter_context(_bar(nbytes, title)) if progress else lambda count: None


@contextmanager
def _bar(nbytes: int, title: str) -> Iterator[Advance]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected the package tqdm (pip install tqdm)") from error
    lock = threading.Lock()
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=title) as bar:

        def advance(count: int) -> None:
            with lock:  # the threads that read share the bar
                bar.update(count)

        yield advance


def put_stacks(
    stacks: Sequence[Stack], share: Share, pool: ThreadPoolExecutor, advance: Advance
) -> list[list[Array]]:
    """Reads a share of some stacks and puts it on its devices.

    Args:
        stacks: The stacks, all of as many experts.
        share: The experts, and the devices.
        pool: Threads to read with.
        advance: Told how many bytes have been read, from any thread.

    Returns:
        Per stack, an array e4m3[experts,rows,columns] on each of the devices.

    Raises:
        ValueError: A file ended or cannot be read; names file and tensor.
    """
    put = _stream if _is_streamed(share) else _fill
    return put(stacks, share, pool, advance)


def _default_device() -> jax.Device:
    (device,) = jax.device_put(np.zeros(())).devices()
    return device


def _is_streamed(share: Share) -> bool:
    """Whether the devices have memory of their own, and the arrays go there."""
    if share.memory_kind in ("pinned_host", "unpinned_host"):
        return False
    return (share.devices[0] or _default_device()).platform != "cpu"


def _fill(
    stacks: Sequence[Stack],
    share: Share,
    pool: ThreadPoolExecutor,
    advance: Advance,
) -> list[list[Array]]:
    """Reads a share into one host buffer per stack; gives the arrays of each stack, per device."""
    buffers, jobs = [], []
    for which, stack in enumerate(stacks):
        whole = Slab(stack, which, share.experts)
        buffers.append(aligned_empty(whole.shape))
        whole.clear_padding(buffers[which])
        jobs += [(piece, buffers[which][position]) for piece, position in whole.pieces]
    jobs.sort(key=lambda job: job[0].position)
    futures = [pool.submit(_read, piece, matrix, advance) for piece, matrix in jobs]
    for future in futures:
        future.result()
    return [
        [jax.device_put(buffer.view(E4M3), sharding) for sharding in share.shardings]
        for buffer in buffers
    ]


def _stream(
    stacks: Sequence[Stack],
    share: Share,
    pool: ThreadPoolExecutor,
    advance: Advance,
) -> list[list[Array]]:
    """`_fill` by way of a ring of small host buffers, for devices with memory of their own."""
    start, count = share.experts.start, len(share.experts)
    slabs = slabs_in_file_order(stacks, share.experts, SLAB_BYTES)
    arrays: list[list[Array]] = [
        [
            jnp.empty((count, s.rows, s.columns), E4M3, device=sharding)
            for sharding in share.shardings
        ]
        for s in stacks
    ]
    largest = max(math.prod(slab.shape) for slab in slabs)
    free = [aligned_empty((largest,)) for _ in range(min(RING, len(slabs)))]
    default = _default_device()
    reading: deque[tuple[Slab, np.ndarray, Future[list[Array]]]] = deque()
    placing: deque[tuple[np.ndarray, list[Array]]] = deque()

    def send(slab: Slab, buffer: np.ndarray) -> list[Array]:
        target = buffer[: math.prod(slab.shape)].reshape(slab.shape)
        slab.clear_padding(target)
        for piece, position in slab.pieces:
            _read(piece, target[position], advance)
        # In this thread, as the copy to pinned memory may happen within the call. What a caller's
        # jax.default_device says does not reach other threads by itself.
        with jax.default_device(default):
            return [jax.device_put(target.view(E4M3), sharding) for sharding in share.shardings]

    def place() -> None:
        slab, buffer, future = reading.popleft()
        first: Any = np.int32(slab.experts.start - start)
        tokens = []
        for position, (part, sharding) in enumerate(
            zip(future.result(), share.shardings, strict=True)
        ):
            if transfers.is_guarded(part):
                first = jax.device_put(np.int32(slab.experts.start - start), sharding)
            array, token = _place(arrays[slab.which][position], part, first)
            arrays[slab.which][position] = array
            tokens.append(token)
        placing.append((buffer, tokens))

    for slab in slabs:
        while not free:
            if not placing:
                place()
            buffer, tokens = placing.popleft()
            jax.block_until_ready(tokens)
            free.append(buffer)
        buffer = free.pop()
        reading.append((slab, buffer, pool.submit(send, slab, buffer)))
        while reading and reading[0][2].done():
            place()
    while reading:
        place()
    return arrays


def _read(piece: Piece, matrix: np.ndarray, advance: Advance) -> None:
    piece.read(matrix)
    advance(piece.nbytes)


@partial(jax.jit, donate_argnums=0)
def _place(array: Array, slab: Array, first: Array) -> tuple[Array, Array]:
    """Puts a slab in its place; the second result says when the slab has been read."""
    # As bytes: XLA converts e4m3 to f16 and back on a CPU, and NaN need not survive that.
    target, source = (jax.lax.bitcast_convert_type(a, jnp.uint8) for a in (array, slab))
    target = jax.lax.dynamic_update_slice(target, source, (first, 0, 0))
    return jax.lax.bitcast_convert_type(target, E4M3), source[0, 0, 0]
