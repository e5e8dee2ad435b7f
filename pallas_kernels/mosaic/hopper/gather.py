"""Token rows picked by index, copied into pipeline stages while the tensor cores work.

Hopper's TMA cannot gather, so the producer's threads copy the rows themselves (`cp.async`), a
128-column step of a tile at a time, to where TMA would have put them:

    thread t     16-byte chunk t % 8 of rows t / 8, t / 8 + 16, ...; the scale of row t
                 (rows of 16 bits: chunks t % 8 and t % 8 + 8, which lie in two swizzled halves)

A step is committed `GATHER_DELAY` steps later, when its copies have landed. The interpreter has no
`cp.async`; there, callers gather the rows first.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax._src.lib.mlir.dialects import arith
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic.ptx import (
    asm,
    constant,
    flat,
    global_address,
    i32,
    load_i32,
    shared_address,
    thread_of_warpgroup,
)
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import Quantized

GATHER_DELAY = 2
"""Steps under way before the oldest must have landed."""

_CHUNK = 16
_CHUNKS = QUANT_BLOCK // _CHUNK
_COPY_CHUNK = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;"
_COPY_OTHER_HALF = "cp.async.cg.shared.global.L2::128B [$0+1024], [$1+128], 16;"
_COPY_SCALE = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.ca.shared.global [$0], [$1], 4; }"


def gather_first(tokens: Quantized, row_token: Int32[Array, " M"]) -> Quantized:
    """The token of each row, by XLA; rows of padding are those of token 0."""
    token = jnp.maximum(row_token, 0)
    return Quantized(tokens.values[token], tokens.scales[:, token])


def copy_rows(
    tokens: Quantized, row_token, row, k, stage_smem, scales_smem, width: int, transforms
) -> None:
    """Starts copying one 128-column step of a tile.

    Args:
        tokens: `e4m3[T, K]` or `f16[T, K]` and `f32[K/128, T]` in global memory.
        row_token: `i32[M]`, the token of each row; -1 (padding) copies token 0.
        row: The tile's first row.
        k: The step.
        stage_smem: `[block_m, 128]` of the same dtype, tiled and swizzled by `transforms`.
        scales_smem: `f32[block_m or more]`.
        width: Rows to copy, at most 128.
        transforms: Of `stage_smem`.
    """
    x, x_scales = tokens
    num_tokens, num_columns = x.shape
    itemsize = x.dtype.itemsize
    refs = (plgpu.RefType(),) * 3
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*refs, splat, splat, plgpu.RefType(transforms), plgpu.RefType()))
    def copy(_, x, x_scales, row_token, row, k, stage, scales):
        (row,), (k,) = row.registers.flat, k.registers.flat
        thread = thread_of_warpgroup()
        chunk = arith.remui(thread, constant(_CHUNKS))
        first = arith.divui(thread, constant(_CHUNKS))

        def line(inside):
            if itemsize == 1:
                return arith.muli(inside, constant(QUANT_BLOCK))
            # Eight rows have 16 lines of 128 bytes: first those of columns 0 to 63.
            of_eight = arith.muli(arith.divui(inside, constant(8)), constant(16 * 128))
            return arith.addi(of_eight, arith.muli(arith.andi(inside, constant(7)), constant(128)))

        def token_of(inside):
            return arith.maxsi(load_i32(row_token, arith.addi(row, inside)), constant(0))

        column = arith.addi(
            arith.muli(k, constant(QUANT_BLOCK)), arith.muli(chunk, constant(_CHUNK // itemsize))
        )
        for i in range(-(-width * _CHUNKS // 128)):
            inside = arith.addi(first, constant(i * 128 // _CHUNKS))
            start = flat(token_of(inside), num_columns, column)
            source = global_address(x, start, itemsize)
            # 128-byte swizzle: the chunk's index xor the row's, modulo 8.
            swizzled = arith.xori(chunk, arith.andi(inside, constant(_CHUNKS - 1)))
            offset = arith.addi(line(inside), arith.muli(swizzled, constant(_CHUNK)))
            target = arith.addi(shared_address(stage), offset)
            asm(_COPY_CHUNK, [target, source], "r,l")
            if itemsize == 2:  # the other 64 columns, 128 bytes on, are 8 lines on in the stage
                asm(_COPY_OTHER_HALF, [target, source], "r,l")

        token = token_of(arith.remui(thread, constant(width)))
        source = global_address(x_scales, flat(k, num_tokens, token), 4)
        target = arith.addi(shared_address(scales), arith.muli(thread, constant(4)))
        inside = arith.cmpi(arith.CmpIPredicate.ult, thread, constant(width))
        asm(_COPY_SCALE, [target, source, arith.extui(i32(), inside)], "r,l,r")
        asm("cp.async.commit_group;", [], "")

    copy(x, x_scales, row_token, row, jnp.int32(k), stage_smem, scales_smem)


def wait_landed(pending: int) -> None:
    """Waits until at most `pending` of the thread's steps are under way; the rest may be read."""

    @plgpu.inline_mgpu(arg_types=())
    def wait(_):
        asm(f"cp.async.wait_group {pending};", [], "")
        asm("fence.proxy.async.shared::cta;", [], "")

    wait()
