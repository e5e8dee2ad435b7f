"""The releases of JAX that this package is tested with; another one gets a warning, not an error.

The GPU interface of Pallas changes between releases, so a backend may need less than the window:
`Backend.unsupported_reason` says so.
"""

from __future__ import annotations

import re
import warnings

import jax

OLDEST = (0, 11, 1)
NEWEST = (0, 12)
"""The newest minor version; all of its patches count."""


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (0, 12, 0) for "0.12.0.1" and "0.12.0.dev20260101"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def warn_outside() -> None:
    """Warns once per import of the package if the installed JAX is outside of the window."""
    found = release(jax.__version__)
    if found >= OLDEST and found[:2] <= NEWEST:
        return
    oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
    warnings.warn(
        f"jax_moe is tested with JAX {oldest} to {newest}.x, got {jax.__version__}", stacklevel=3
    )
