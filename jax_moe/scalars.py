"""Scalar arguments: a number of Python, NumPy or JAX, checked, as 32 bits.

The bridge to PyTorch checks its scalars here as well, so both refuse the same ones. Errors name the
argument, what was expected and what came.
"""

import operator
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_MAX_F32 = float(np.finfo(np.float32).max)
_PRINTED_BITS = 128  # Python refuses to print an integer of more than 4300 digits
_QUOTED = 200


def integer(name: str, value: Any, low: int, high: int, step: int = 1) -> Array | np.int32:
    """An integer scalar as int32; its range is checked where its value is known.

    A concrete JAX array is read back, for which the host waits.

    Args:
        name: The argument's.
        value: A Python integer, or a NumPy or JAX array of rank 0.
        low: Least concrete value allowed.
        high: Greatest concrete value allowed.
        step: Concrete values are multiples of it.

    Returns:
        The int32 scalar. A traced one of a wider type is clipped, so that the cast cannot wrap.

    Raises:
        TypeError: Not an integer.
        ValueError: Not a scalar, or out of range.
    """
    if type(value) is not int:  # the usual case, and it is quick
        _check(name, value, "an integer", is_integer, jnp.integer)
        if isinstance(value, jax.core.Tracer):
            return _traced_integer(value)
        value = int(_on_host(value))
    if not low <= value <= high or value % step:
        wanted = f"{low}..{high}" if step == 1 else f"a multiple of {step} in {low}..{high}"
        raise ValueError(f"{name}: expected {wanted}, got {printed(value)}")
    return np.int32(value)


def static_integer(name: str, value: Any, low: int, high: int, step: int = 1) -> int:
    """An integer that is known when the program is made, as `integer` checks it.

    Raises:
        TypeError: Not an integer, or traced.
        ValueError: Not a scalar, or out of range.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name}: expected a static integer, got a traced {got(value)}")
    return int(integer(name, value, low, high, step))


def real(name: str, value: Any) -> Array | np.float32:
    """A real scalar as float32.

    A concrete JAX array is read back, for which the host waits.

    Args:
        name: The argument's.
        value: A Python number, or a NumPy or JAX array of rank 0.

    Returns:
        The float32 scalar.

    Raises:
        TypeError: Not a real number.
        ValueError: Not a scalar, or known and not finite in float32.
    """
    if type(value) is not float:  # the usual case, and it is quick
        _check(name, value, "a real number", is_real, jnp.number)
        if isinstance(value, jax.core.Tracer):
            return value.astype(jnp.float32)
        try:
            value = float(_on_host(value))
        except OverflowError:
            raise ValueError(
                f"{name}: expected a finite float32, got {printed(operator.index(value))}"
            ) from None
    if not abs(value) <= _MAX_F32:
        raise ValueError(f"{name}: expected a finite float32, got {value}")
    return np.float32(value)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer scalar of Python or NumPy; a bool is none."""
    return type(value) is int or _is_scalar(value, int, jnp.integer)


def is_real(value: Any) -> bool:
    """Whether a value is a real scalar of Python or NumPy; a bool is none."""
    return type(value) in (int, float) or _is_scalar(value, (int, float), jnp.number)


def boolean(name: str, value: Any) -> bool:
    """A bool that is known when the program is made, of Python or NumPy; nothing else that is true.

    Raises:
        TypeError: It is no bool.
    """
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name}: expected a bool, got {quoted_with_type(value)}")
    return bool(value)


def alive(name: str, value: Any) -> None:
    """Checks that an array still has its memory: a deleted one, or one that was donated, has none.

    Raises:
        ValueError: It has none.
    """
    is_concrete = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    if is_concrete and value.is_deleted():
        raise ValueError(f"{name}: expected an array with memory, got a deleted or donated one")


def got(value: Any) -> str:
    """What came, for a message: dtype and shape of an array, the type of anything else."""
    if value is None:
        return "None"
    if isinstance(value, np.ma.MaskedArray):
        return f"a masked array, whose mask would be lost; pass {_array(value)} from filled()"
    if isinstance(value, jax.Array | np.ndarray):
        return _array(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if kind.startswith("torch."):
        kind += " (interop.torch_moe takes torch tensors, interop.to_jax converts them)"
    return kind


def printed(number: int) -> str:
    """An integer for a message, of however many digits."""
    if number.bit_length() <= _PRINTED_BITS:
        return str(number)
    return f"an integer of {number.bit_length()} bits"


def quoted(value: Any) -> str:
    """Anything for a message: its `repr`, cut short; the type of arrays and of what cannot."""
    if isinstance(value, int):
        return printed(value)
    if _is_array(value):
        return _without_advice(value)
    if isinstance(value, tuple) and type(value) is not tuple:  # of arrays, most likely
        return got(value)
    is_container = isinstance(value, tuple | list | dict | set | frozenset)
    try:
        return (_of_parts.repr(value) if is_container else repr(value))[:_QUOTED]
    except Exception:  # of a class of the caller's, or Python's, of an integer of many digits
        return got(value)


def quoted_with_type(value: Any) -> str:
    """`quoted` and the type, for a message about a value of another type."""
    return got(value) if _is_array(value) else f"{quoted(value)} ({got(value)})"


def _without_advice(value: Any) -> str:
    return got(value).partition(" (")[0]


class _OfParts(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        return _without_advice(x) if _is_array(x) else repr(x)


_of_parts = _OfParts(maxtuple=_QUOTED, maxlist=_QUOTED, maxdict=_QUOTED, maxstring=_QUOTED)


def _is_array(value: Any) -> bool:
    """Whether it is an array of JAX or NumPy or a tensor of torch.

    To print many values helps nobody, and to print a tensor whose storage was freed ends the
    process.
    """
    kinds = type(value).__mro__
    return isinstance(value, jax.Array | np.ndarray) or any(
        (kind.__module__, kind.__name__) == ("torch", "Tensor") for kind in kinds
    )


def _array(value: Any) -> str:
    byteorder = getattr(value.dtype, "byteorder", "")  # JAX's own dtypes, of keys, have none
    order = {">": "big-endian ", "<": "little-endian "}.get(byteorder, "")
    return f"{order}{value.dtype.name} {list(value.shape)}"


def _is_scalar(value: Any, types: Any, kind: Any) -> bool:
    if not isinstance(value, np.generic):
        return isinstance(value, types) and not isinstance(value, bool)
    # By its dtype: the scalars of ml_dtypes, such as bfloat16, are no `np.floating`.
    return jnp.issubdtype(value.dtype, kind) and value.dtype.kind not in "cm"


def _check(name: str, value: Any, wanted: str, is_scalar: Callable[[Any], bool], kind: Any) -> None:
    if isinstance(value, np.ma.MaskedArray):  # numpy.ma.masked is one as well
        raise TypeError(f"{name}: expected {wanted}, got {got(value)}")
    if isinstance(value, jax.Array | np.ndarray):
        is_kind = jnp.issubdtype(value.dtype, kind)
        if not is_kind or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(f"{name}: expected {wanted}, got {got(value)}")
        if value.ndim:
            raise ValueError(f"{name}: expected a scalar, got {got(value)}")
        alive(name, value)
    elif not is_scalar(value):
        raise TypeError(f"{name}: expected {wanted}, got {quoted_with_type(value)}")


def _on_host(value: Any) -> Any:
    """The value without an implicit transfer, which `jax.transfer_guard` may forbid."""
    return jax.device_get(value) if isinstance(value, jax.Array) else value


def _traced_integer(value: Array) -> Array:
    if not np.can_cast(value.dtype, np.int32):  # clipping would cost the others a launch
        least = 0 if jnp.issubdtype(value.dtype, jnp.unsignedinteger) else -(2**30)
        value = jnp.clip(value, least, 2**30)
    return value.astype(jnp.int32)
