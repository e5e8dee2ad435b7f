"""The streaming read of the roofline probe. A file of its own: Triton reads a kernel's source."""

import triton
import triton.language as tl


@triton.jit
def read_and_sum(source, sink, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads BLOCK consecutive f32 and leaves their sum, so that no read is dropped."""
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(sink + program, tl.sum(tl.load(source + offsets), axis=0))
