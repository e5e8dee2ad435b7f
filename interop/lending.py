"""Tensors whose memory JAX holds, and how a program ends with such memory out.

XLA gives an imported buffer back on a thread of its own, some time after the program that read it.
If that drops the last reference to a tensor with a Python object but the object's own, torch takes
the GIL (`c10/util/intrusive_ptr.h`, "PyObject preservation"), and CPython ends a thread that asks
for it once the interpreter finalizes, in the middle of a destructor: "terminate called without an
active exception", exit code 134. JAX and torch do that without us as well.
"""

import atexit
import collections
import contextlib
import ctypes
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_LAST_WAIT_S = 10.0
_LOOKED_THROUGH = 256

_lent: collections.deque["weakref.ref[torch.Tensor]"] = collections.deque()
_look_through_at = _LOOKED_THROUGH


def note(aliases: Iterable[torch.Tensor]) -> None:
    """Notes tensors that capsules for JAX are made of and that nothing else will refer to.

    Torch keeps their Python objects, and so the weak references, until JAX gives the memory back.
    What came back is forgotten now and then: a callback for each would cost every call of the
    layer.
    """
    _lent.extend(map(weakref.ref, aliases))
    if len(_lent) > _look_through_at:
        _forget_what_came_back()


def _forget_what_came_back() -> None:
    """Other threads may note something meanwhile."""
    global _look_through_at
    for _ in range(len(_lent)):
        with contextlib.suppress(IndexError):  # another thread looks through them, too
            reference = _lent.popleft()
            if reference() is not None:
                _lent.append(reference)
    _look_through_at = _LOOKED_THROUGH + 2 * len(_lent)


def addresses(tensors: Iterable[Any]) -> list[int]:
    """Where the memory of tensors is; half a microsecond for four of them."""
    return [tensor.data_ptr() for tensor in tensors]


def refuse_moved(tensors: Mapping[str, torch.Tensor], lent_at: Iterable[int], holder: str) -> None:
    """Names the first tensor whose memory is no longer where JAX reads it.

    A storage can be given other memory under all who hold it, an alias and a capsule too.

    Args:
        tensors: By the names that errors call them.
        lent_at: Their `addresses` when JAX got the memory.
        holder: What reads them.

    Raises:
        RuntimeError: The memory of one is elsewhere.
    """
    for (name, tensor), address in zip(tensors.items(), lent_at, strict=True):
        if tensor.data_ptr() != address:
            raise RuntimeError(
                f"{name}: expected its memory where it was when this {holder} was made; "
                "share_memory(), a queue of torch.multiprocessing or a resize moved or freed it. "
                f"Make the {holder} again"
            )


@atexit.register
def keep_what_is_lent() -> None:
    """From here on JAX may give memory back at any time: no reference that it drops is the last.

    One more reference to each tensor is never given back; the process ends soon.
    """
    kept = [alias for alias in (reference() for reference in list(_lent)) if alias is not None]
    for alias in kept:
        capsule = torch.utils.dlpack.to_dlpack(alias)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(capsule))
    # A thread that dropped its reference before that one came still waits for the GIL, to drop the
    # one of torch to the Python object, which then counts one more than: torch's new one, the
    # list's, the loop's, the argument's.
    give_up = time.monotonic() + _LAST_WAIT_S
    for alias in kept:
        while sys.getrefcount(alias) > 4 and time.monotonic() < give_up:
            time.sleep(1e-4)
