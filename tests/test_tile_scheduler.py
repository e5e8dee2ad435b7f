"""How tiles that are cut along K are dealt out: every segment exactly once, and found again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic.hopper.tile_scheduler import Cut


@functools.partial(jax.jit, static_argnums=(0, 2))
def pieces(cut, total, most):
    """tile, begin, end of every (CTA, index)."""
    ctas, indices = (jnp.arange(n, dtype=jnp.int32) for n in (cut.sms, most))

    def piece(cta, index):
        linear, is_whole = cut.whole(total, cta, index)
        whole = linear, jnp.int32(0), jnp.int32(cut.segments)
        parts = zip(whole, cut.part(total, cta, index), strict=True)
        return tuple(jnp.where(is_whole, a, b) for a, b in parts)

    return jax.vmap(lambda cta: jax.vmap(lambda index: piece(cta, index))(indices))(ctas)


@pytest.mark.parametrize("cut", [Cut(4, 132), Cut(7, 132), Cut(2, 5), Cut(3, 1)])
@pytest.mark.parametrize("total", [0, 1, 2, 5, 32, 33, 131, 132, 136, 400, 416, 512, 1568])
def test_pieces_cover_every_segment_once(cut, total):
    most = total // cut.sms + cut.segments + 3
    tile, begin, end = map(np.asarray, pieces(cut, jnp.int32(total), most))
    seen = np.zeros((total, cut.segments), int)
    owners, cut_tiles = {}, int(cut.cut_tiles(jnp.int32(total)))
    for cta in range(cut.sms):
        live = end[cta] > begin[cta]
        count = int(live.sum())
        assert live[:count].all(), "a CTA stops at its first dead piece"
        for index in range(count):
            t, b, e = int(tile[cta, index]), int(begin[cta, index]), int(end[cta, index])
            seen[t, b:e] += 1
            if b == 0:
                owners[t] = cta
                assert e == cut.segments or index == count - 1, (
                    "a cut tile of one's own is the last"
                )
            else:
                assert index == total // cut.sms, "what is handed over begins the run"
    np.testing.assert_array_equal(seen, 1)
    assert set(owners) == set(range(total))
    units = jnp.arange(cut_tiles * cut.segments, dtype=jnp.int32)
    if units.size:
        holder = np.asarray(jax.vmap(lambda u: cut.holder(jnp.int32(total), u))(units))
        first = np.asarray(
            jax.vmap(lambda c: cut.first_unit(jnp.int32(total), c))(
                jnp.arange(cut.sms + 1, dtype=jnp.int32)
            )
        )
        assert ((first[holder] <= units) & (units < first[holder + 1])).all()
        assert np.diff(first).max() - np.diff(first).min() <= 1, "equal runs"
