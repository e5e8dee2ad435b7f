"""Zeros for the tokens without a local expert, written by a spare warp of the up-projection.

    producer warp 2 of CTA c, for tokens c, c + sms, ...
        32 lanes     one pair per lane; if none of the token's is local, zeros to its row
        pause        so that the copies that feed the tensor cores come first

The unpermute kernel then writes the other tokens only. HBM has time for these rows while tiles are
multiplied, and none while they are combined.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.mosaic.ptx import asm, constant, flat, global_address

MAX_PAIRS = 32
"""Pairs per token, at most: one per lane."""

_PAUSE_NS = 500
_ZERO_IF_IDLE = """{{
    .reg .pred mine, any, more; .reg .b32 lane, row, left; .reg .b64 at;
    mov.u32 lane, %laneid;
    mov.b32 row, -1;
    setp.lt.u32 mine, lane, {pairs};
    mul.wide.u32 at, lane, 4;
    add.s64 at, at, $0;
    @mine ld.global.nc.b32 row, [at];
    setp.ge.s32 mine, row, 0;
    vote.sync.any.pred any, mine, 0xffffffff;
    @any bra done;
    mul.wide.u32 at, lane, {lane_bytes};
    add.s64 at, at, $1;
    mov.b32 left, {stores};
    again:
    .pragma "nounroll";
    st.global.{vector} [at], {zeros};
    add.s64 at, at, 32 * {lane_bytes};
    sub.s32 left, left, 1;
    setp.gt.s32 more, left, 0;
    @more bra again;
    nanosleep.u32 {pause};
    done:
}}"""


def zero_rows(pair_row: Int32[Array, "T k"], hidden_size: int) -> SideJob:
    """The side job of a matmul that gives `bf16[T, hidden_size]`.

    Rows of tokens without a local pair are zeros, the others are unwritten.

    Args:
        pair_row: `i32[T, k]`, row of each pair, -1 where it is not local.
        hidden_size: Columns, a multiple of 128.

    Raises:
        ValueError: A token has more than `MAX_PAIRS` pairs.
    """
    num_tokens, top_k = pair_row.shape
    if top_k > MAX_PAIRS:
        raise ValueError(f"pair_row: expected at most {MAX_PAIRS} pairs per token, got {top_k}")
    return SideJob(
        inputs=(pair_row,),
        out_type=jax.ShapeDtypeStruct((num_tokens, hidden_size), jnp.bfloat16),
        run=_write,
    )


def code(top_k: int, hidden_size: int) -> str:
    """PTX of one warp for one token: $0 is where its pairs' rows are, $1 its row of the output."""
    row_bytes = 2 * hidden_size
    lane_bytes = 16 if row_bytes % (32 * 16) == 0 else 8
    words = lane_bytes // 4
    return _ZERO_IF_IDLE.format(
        pairs=top_k,
        lane_bytes=lane_bytes,
        stores=row_bytes // (32 * lane_bytes),
        vector=f"v{words}.b32",
        zeros="{" + ", ".join(["0"] * words) + "}",
        pause=_PAUSE_NS,
    )


def _write(inputs, out, sms: int) -> None:
    (pair_row,) = inputs
    num_tokens, top_k = pair_row.shape
    hidden_size = out.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def zero_if_idle(_, pair_row, out, token):
        (token,) = token.registers.flat
        pairs = global_address(pair_row, flat(token, top_k, constant(0)), 4)
        row = global_address(out, flat(token, hidden_size, constant(0)), 2)
        asm(code(top_k, hidden_size), [pairs, row], "l,l")

    cta = lax.axis_index("sm")

    def step(i, carry):
        zero_if_idle(pair_row, out, cta + i * sms)
        return carry

    mine = lax.div(num_tokens - cta + (sms - 1), jnp.int32(sms))
    lax.fori_loop(0, mine, step, jnp.int32(0))
