"""The Triton kernels around DeepGEMM: route, gather, SwiGLU + quantize, unpermute; and stage.

Rows are expert-major; each expert starts at a multiple of ALIGN and `ends[e]` is the row after its
last one (DeepGEMM's "psum" layout). The row of a pair inside its expert comes from an atomic
counter, so it may differ between runs; no row's value depends on it, and unpermute adds in the
order of the choices, so results do not.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from pallas_kernels.triton.unpermute import unpermute_kernel as unpermute_kernel

_DROPPED = tl.constexpr(-(1 << 62))


@triton.jit
def _key(scores, index, bits: tl.constexpr):
    """Unique integers in the order of the scores, NaN last, ties to the lowest index."""
    raw = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(raw < 0, raw ^ 0x7FFFFFFF, raw).to(tl.int64)
    ordered = tl.where(scores != scores, -2147483647, ordered)
    return ordered * (1 << bits) + ((1 << bits) - 1 - index)


@triton.jit
def route_kernel(
    logits, bias, pair_expert, pair_slot, weights, counts, local_offset, factor,
    E: tl.constexpr, E_LOCAL: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr,
    TOP_K: tl.constexpr, GROUP_BLOCK: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """One token: group-limited top-k, and a slot in each chosen local expert."""
    token = tl.program_id(0)
    groups = tl.arange(0, N_GROUP)
    member = tl.arange(0, GROUP_BLOCK)[None, :]
    expert = groups[:, None] * (E // N_GROUP) + member
    exists = (member < E // N_GROUP) & (groups[:, None] < N_GROUP)
    logit = tl.load(logits + token * E + expert, mask=exists, other=float("-inf"))
    if SOFTMAX:
        highest = tl.max(tl.max(logit, axis=1), axis=0)
        total = tl.sum(tl.sum(tl.exp(logit - highest), axis=1), axis=0)
        score = tl.exp(logit - highest) / total
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    biased = score + tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
    key = tl.where(exists, _key(biased, expert, 16), _DROPPED)
    first = tl.max(key, axis=1)
    rest = tl.where(key == first[:, None], _DROPPED, key)
    second = tl.max(rest, axis=1)
    best_two = (key == first[:, None]) | (key == second[:, None])
    group_key = _key(tl.sum(tl.where(best_two, biased, 0.0), axis=1), groups, 16)
    kept = groups < 0
    for _ in tl.static_range(TOPK_GROUP):
        best = group_key == tl.max(group_key, axis=0)
        kept = kept | best
        group_key = tl.where(best, _DROPPED, group_key)
    key = tl.where(kept[:, None], key, _DROPPED)

    choice = tl.arange(0, TOP_K)
    ids = tl.zeros([TOP_K], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(tl.max(key, axis=1), axis=0)
        # The low bits of a key name its expert: no reduction is spent on finding it.
        ids = tl.where(choice == i, (0xFFFF - (best & 0xFFFF)).to(tl.int32), ids)
        key = tl.where(key == best, _DROPPED, key)
    logit = tl.load(logits + token * E + ids)
    chosen = tl.exp(logit - highest) / total if SOFTMAX else 1.0 / (1.0 + tl.exp(-logit))

    local = ids - local_offset
    is_local = (local >= 0) & (local < E_LOCAL)
    slot = tl.atomic_add(counts + local, 1, mask=is_local, sem="relaxed")
    pair = token * TOP_K + choice
    tl.store(weights + pair, chosen / (tl.sum(chosen, axis=0) + 1e-20) * factor)
    tl.store(pair_expert + pair, tl.where(is_local, local, -1))
    tl.store(pair_slot + pair, slot, mask=is_local)


@triton.jit
def gather_kernel(
    hidden, hidden_scale, pair_expert, pair_slot, counts, rows, row_scale, pair_row, ends,
    num_tokens, num_rows,
    ALIGN: tl.constexpr, E_LOCAL: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    WORDS: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its row, as WORDS 4-byte words, and its scales to each of its local experts."""
    token = tl.program_id(0)
    experts = tl.arange(0, E_BLOCK)
    count = tl.load(counts + experts, mask=experts < E_LOCAL, other=0)
    padded = (count + ALIGN - 1) // ALIGN * ALIGN
    start = tl.cumsum(padded, axis=0) - padded
    if token == 0:
        tl.store(ends + experts, start + count, mask=experts < E_LOCAL)

    choice = tl.arange(0, TOP_K)
    expert = tl.load(pair_expert + token * TOP_K + choice)
    is_local = expert >= 0
    base = tl.sum(tl.where(expert[:, None] == experts[None, :], start[None, :], 0), axis=1)
    slot = tl.load(pair_slot + token * TOP_K + choice, mask=is_local, other=0)
    row = tl.where(is_local, base + slot, -1)
    tl.store(pair_row + token * TOP_K + choice, row)

    if tl.max(row, axis=0) >= 0:
        block = tl.arange(0, SCALE_BLOCK)
        scale = tl.load(hidden_scale + block.to(tl.int64) * num_tokens + token, mask=block < SCALES)
        for first in tl.static_range(0, WORDS, BLOCK):
            word = first + tl.arange(0, BLOCK)
            value = tl.load(hidden + token.to(tl.int64) * WORDS + word, mask=word < WORDS)
            for i in tl.static_range(TOP_K):
                target = tl.max(tl.where(choice == i, row, -1), axis=0).to(tl.int64)
                live = (word < WORDS) & (target >= 0)
                tl.store(rows + target * WORDS + word, value, mask=live)
        for i in tl.static_range(TOP_K):
            target = tl.max(tl.where(choice == i, row, -1), axis=0)
            live = (block < SCALES) & (target >= 0)
            tl.store(row_scale + block.to(tl.int64) * num_rows + target, scale, mask=live)


@triton.jit
def stage_kernel(
    hidden, hidden_scale, words, scales, num_tokens,
    WORDS: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its row, as WORDS 4-byte words, and its scales, to the same row of a buffer."""
    token = tl.program_id(0).to(tl.int64)
    for first in tl.static_range(0, WORDS, BLOCK):
        word = first + tl.arange(0, BLOCK)
        value = tl.load(hidden + token * WORDS + word, mask=word < WORDS)
        tl.store(words + token * WORDS + word, value, mask=word < WORDS)
    block = tl.arange(0, SCALE_BLOCK)
    scale = tl.load(hidden_scale + block.to(tl.int64) * num_tokens + token, mask=block < SCALES)
    tl.store(scales + token * SCALES + block, scale, mask=block < SCALES)


@triton.jit
def swiglu_quantize_kernel(
    gemm1, ends, values, scales, num_rows,
    ALIGN: tl.constexpr, E_LOCAL: tl.constexpr, E_BLOCK: tl.constexpr, INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Persistent over (ROWS rows, GROUPS groups of 128 columns); skips what holds no live row."""
    experts = tl.arange(0, E_BLOCK)
    end = tl.load(ends + experts, mask=experts < E_LOCAL, other=0)  # no row is below 0
    before = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < E_LOCAL), other=0)
    start = (before + ALIGN - 1) // ALIGN * ALIGN
    columns: tl.constexpr = INTERMEDIATE // (GROUPS * 128)
    used = (tl.max(end, axis=0) + ROWS - 1) // ROWS * columns
    group = tl.arange(0, GROUPS)
    within = group[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    item = tl.program_id(0)
    while item < used:  # not `range`: the interpreter cannot count to a tensor
        row = item // columns * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
        live = tl.max(inside.to(tl.int32), axis=1) > 0
        if tl.max(live.to(tl.int32), axis=0) > 0:
            column = (item % columns) * GROUPS * 128 + within
            wide = row.to(tl.int64)[:, None, None]
            mask = live[:, None, None] & (column >= 0)
            up = tl.load(gemm1 + wide * (2 * INTERMEDIATE) + column, mask=mask, other=0.0)
            gate = tl.load(
                gemm1 + wide * (2 * INTERMEDIATE) + INTERMEDIATE + column, mask=mask, other=0.0
            ).to(tl.float32)
            # A saturating sigmoid: exp may overflow to inf, the quotient is then 0.
            hidden = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
            scale = tl.maximum(tl.max(tl.abs(hidden), axis=2), 1e-10) / 448.0
            scaled = tl.clamp(hidden / scale[:, :, None], -448.0, 448.0)
            tl.store(values + wide * INTERMEDIATE + column, scaled.to(tl.float8e4nv), mask=mask)
            block = (item % columns) * GROUPS + group
            place = block.to(tl.int64)[None, :] * num_rows + row[:, None]
            tl.store(scales + place, scale, mask=live[:, None] & (block[None, :] >= 0))
        item += tl.num_programs(0)
