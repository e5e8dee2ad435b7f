"""The inline PTX that zeroes the rows of idle tokens, emulated: no CPU has that instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.mosaic.hopper import zero_rows
from tests import ptx_emulator


@pytest.mark.parametrize("top_k", [1, 8, 11, 32])
@pytest.mark.parametrize("hidden_size", [128, 384, 512, 7168])
def test_a_row_is_zeroed_if_no_pair_is_local(hidden_size, top_k):
    code = zero_rows.code(top_k, hidden_size)
    for local in (None, 0, top_k - 1):
        pair_row = np.full((3, top_k), 5, np.int32)  # neighbours with pairs on both sides
        pair_row[1] = -1
        if local is not None:
            pair_row[1, local] = 0  # the first row is a row, too
        out = np.full((3, hidden_size), 0x7FC0, np.uint16)
        memory = ptx_emulator.Memory()
        pairs, rows = memory.add(pair_row), memory.add(out)
        ptx_emulator.run_warp(code, [pairs + 4 * top_k, rows + 2 * hidden_size], memory)
        assert (out[1] == (0 if local is None else 0x7FC0)).all()
        assert (out[[0, 2]] == 0x7FC0).all()
