"""A product and a sum that are rounded once, in NumPy."""

from __future__ import annotations

import numpy as np


def fma(a, b, c):
    """`a b + c` of f32, rounded once: to odd in float64, which leaves the second rounding right."""
    product = a.astype(np.float64) * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    is_even = total.view(np.int64) & 1 == 0
    odd = np.where(is_even & (error != 0), np.nextafter(total, error * np.inf), total)
    return np.where(np.isfinite(error), odd, total).astype(np.float32)
