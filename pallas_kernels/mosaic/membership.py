"""Which tokens chose which local expert: a bit per token and expert, in shared memory.

    members[word, expert]     bit t of word w: token 32 w + t chose the expert; i32, flat

One OR per (token, choice) pair sets them, whatever the number of experts, and equal ids of a token
set one bit. What earlier tokens chose is then the ones below a bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import lanes, layouts
from pallas_kernels.mosaic.indexed_memory import load_at, or_at
from pallas_kernels.shapes import cdiv, round_up

THREADS = 128
WORD = 32
"""Tokens of a word."""

_MAX_PAIRS_PER_THREAD = 16  # on their way together
_MAX_UNROLL = 8


class TopkIds(NamedTuple):
    """Reads the experts of pairs; a pair is `token * k + choice`, one per thread and register.

    Attributes:
        ids: `i32[T, k]` in global memory.
        offset: Global id of local expert 0, a number.
        num_experts: E.
        num_local_experts: E_local.
        interpret: The kernel's `interpret` argument.
    """

    ids: Any
    offset: Any
    num_experts: int
    num_local_experts: int
    interpret: Any

    @property
    def num_pairs(self) -> int:
        """T * k."""
        return self.ids.shape[0] * self.ids.shape[1]

    def steps(self, words: int) -> tuple[int, int]:
        """In how many steps the pairs of so many words are read, and how many pairs each has."""
        num_tokens, top_k = self.ids.shape
        num_pairs = min(words * WORD, num_tokens) * top_k
        size = min(round_up(num_pairs, THREADS), _MAX_PAIRS_PER_THREAD * THREADS)
        return cdiv(num_pairs, size), size

    def first_pair(self, word):
        """The first pair of a word."""
        return word * (WORD * self.ids.shape[1])

    def load(self, pair):
        """`i32[n]`, the global expert of each pair; anything for pairs past the end."""
        place = lax.min(pair, jnp.int32(self.num_pairs - 1))
        return load_at(self.ids, place, layout=flat(pair), interpret=self.interpret)

    def local(self, pair, expert):
        """`i32[n]`, the local number of each pair's expert, -1 where it is not local."""
        local = expert - self.offset
        known = (expert >= 0) & (expert < self.num_experts) & (pair < self.num_pairs)
        return jnp.where(known & (local >= 0) & (local < self.num_local_experts), local, -1)

    def token(self, pair):
        """`i32[n]`, the token of each pair."""
        top_k = jnp.uint32(self.ids.shape[1])
        return lax.div(pair.astype(jnp.uint32), top_k).astype(jnp.int32)


def threads(size: int):
    """`i32[size]`, 0, 1, ...: in the first register the number of the thread."""
    return layouts.iota((size,), 0, plgpu.Layout.WG_STRIDED((size,), 1))


def flat(array) -> plgpu.Layout:
    """The layout of `threads`, for an array of that rank."""
    return plgpu.Layout.WG_STRIDED(array.shape, 1)


def unrollable(length: int) -> int:
    """The least length from `length` on that `fold` takes."""
    return length if length <= _MAX_UNROLL else round_up(length, _MAX_UNROLL)


def fold(length: int, step, carry):
    """`lax.fori_loop(0, length, step, carry)`, eight steps at once: their loads overlap."""
    return lax.fori_loop(0, length, step, carry, unroll=min(length, _MAX_UNROLL))


def clear(ref) -> None:
    """Zeroes an i32 array of shared memory, of a multiple of 128 elements."""
    vector = 4 if ref.shape[0] % (4 * THREADS) == 0 else 1
    shape = (vector * THREADS,)

    @pl.loop(0, ref.shape[0] // shape[0])
    def _piece(i):
        layout = plgpu.Layout.WG_STRIDED(shape, vector)
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), layout)
        ref[pl.ds(i * shape[0], shape[0])] = zeros


def load_first(topk_ids: TopkIds, first_word, words: int):
    """What `mark` starts with, on its way while other things are done."""
    _, size = topk_ids.steps(words)
    return topk_ids.load(threads(size) + topk_ids.first_pair(first_word))


def mark(members, topk_ids: TopkIds, loaded, first_word, words: int, width: int) -> None:
    """Sets the bits of the local pairs of `words` words of tokens.

    Args:
        members: `i32[words * width]` in shared memory, cleared.
        topk_ids: The pairs.
        loaded: From `load_first`.
        first_word: Word of all tokens that is the first of `members`.
        words: Rows of `members`.
        width: Its columns, at least E_local.
    """
    steps, size = topk_ids.steps(words)

    def step(i, expert):
        pair = threads(size) + (topk_ids.first_pair(first_word) + i * size)
        following = topk_ids.load(pair + size)  # on their way while these are marked
        local, token = topk_ids.local(pair, expert), topk_ids.token(pair)
        word = word_of(token) - first_word
        or_at(
            members, word * width + local, bit_of(token), (local >= 0) & (word < words),
            layout=flat(pair), interpret=topk_ids.interpret,
        )  # fmt: skip
        return following

    lax.fori_loop(0, steps, step, loaded)


def word_of(token):
    """`i32[n]`, the word that has the token's bit."""
    return lax.shift_right_logical(token, WORD.bit_length() - 1)


def bit_of(token):
    """`i32[n]`, the token's bit in its word."""
    return lax.shift_left(jnp.full_like(token, 1), token & (WORD - 1))


def ones(members, place, *, layout: plgpu.Layout, interpret, mask=None):
    """`i32[*n]`, how many tokens of each word chose the expert, of those in `mask` if given."""
    bits = load_at(members, place, layout=layout, interpret=interpret)
    bits = bits if mask is None else bits & mask
    return lanes.count_ones(bits, layout=layout, interpret=interpret)
