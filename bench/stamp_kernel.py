"""The probe before and after a call: cycle counter and time of every SM. It needs Triton."""

# mypy: ignore-errors
import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.launch import Launch

WORDS = 5
"""Of a stamp, 32 bits each: cycles (low, high), time in ns (low, high), the SM's number."""


def launch(wait_ns, num_sms: int) -> Launch:
    """One stamp per SM.

    Args:
        wait_ns: i32[1], how long each waits first: the host launches what follows meanwhile, so
            that no gap of its making lies between this kernel and the next.
        num_sms: Of the GPU; programs, which an idle GPU deals out one to each.

    Returns:
        The launch; its output is i32[num_sms, WORDS].
    """
    return Launch(
        kernel=stamp_kernel,
        inputs=(wait_ns,),
        scalars=(),
        outputs=(jax.ShapeDtypeStruct((num_sms, WORDS), jnp.int32),),
        grid=(num_sms,),
        constants={"WORDS": WORDS},
        num_warps=1,
    )


@triton.jit
def stamp_kernel(wait_ns, stamps, WORDS: tl.constexpr):
    """One warp: waits, then writes its SM's cycle counter beside the GPU's global timer."""
    cycles_low, cycles_high, ns_low, ns_high, sm = tl.inline_asm_elementwise(
        asm="""
        {
            .reg .u64 cycles, now, until;
            .reg .pred early;
            mov.u64 now, %globaltimer;
            cvt.u64.u32 until, $5;
            add.u64 until, until, now;
        again:
            mov.u64 now, %globaltimer;
            setp.lt.u64 early, now, until;
            @early nanosleep.u32 200;
            @early bra again;
            mov.u64 cycles, %clock64;
            mov.u64 now, %globaltimer;
            mov.b64 {$0, $1}, cycles;
            mov.b64 {$2, $3}, now;
            mov.u32 $4, %smid;
        }
        """,
        constraints="=r,=r,=r,=r,=r,r",
        args=[tl.load(wait_ns)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )
    stamp = stamps + tl.program_id(0) * WORDS
    tl.store(stamp, cycles_low)
    tl.store(stamp + 1, cycles_high)
    tl.store(stamp + 2, ns_low)
    tl.store(stamp + 3, ns_high)
    tl.store(stamp + 4, sm)
