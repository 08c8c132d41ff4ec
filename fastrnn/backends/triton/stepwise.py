"""Any H: one launch per step, tiled over batch and units; W_hh is read from the caches at every step.

Tensors as in `resident`, and S32 (NS, S, B, H) fp32, which carries the states or their gradients from launch to
launch. Grid: (batch tiles, unit tiles, S). `k` is the position of the step, from 0 to T - 1.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from fastrnn.backends.triton.steps import (
    MASKS,
    add_first,
    add_sums,
    advance,
    fed_back,
    final_gradients,
    finish,
    from_above,
    history,
    initial,
    inside,
    kept,
    lengths_of,
    own_values,
    retreat,
    rows_at,
    through_memory,
    write,
    write_gradients,
)
from fastrnn.backends.triton.values import dot, load_n, store_n, where_n, wide, wide_n, zeros_n


@triton.jit(do_not_specialize=["k", "T", "B", "N", "reverse"], do_not_specialize_on_alignment=MASKS)
def forward(
    XG, W, BIAS, P, H0, C0, Y, HN, CN, C, S32, LENGTHS, OFFSETS, RESETS, k, T, B, N, H, reverse,
    STEP: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, XW: tl.constexpr,
    S: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GIVEN: tl.constexpr, BIASED: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr, RESET: tl.constexpr, SAVE_C: tl.constexpr, SAVE_TAPE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(2)
    backwards = (reverse >> stream) & 1
    N = tl.cast(N, tl.int64)
    XG += stream * N * (XW * H)
    C += stream * N * H
    Y += stream * H
    W += stream * (G * H * H)
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    t = k + backwards * (T - 1 - 2 * k)
    live = t < length
    keep = kept(RESETS, OFFSETS, t, rows, length, T, backwards, B, RESET, PACKED)
    previous = t - 1 + 2 * backwards
    there = inside(previous, length)
    before = rows_at(OFFSETS, previous, rows, (previous >= 0) & (previous < T), B, PACKED)
    r = zeros_n(tl.zeros([BB, BN], tl.float32), G)
    if BIASED:
        r = ()
        for g in tl.static_range(G):
            bias = wide(tl.load(BIAS + stream * (G * H) + g * H + units, mask=mine, other=0.0))
            r = r + (tl.zeros([BB, BN], tl.float32) + bias[None, :],)
    last = H
    if RAGGED:
        last = tl.max(live.to(tl.int32), 0) * H  # a tile without a live row multiplies nothing
    for first in range(0, last, BK):
        ks = first + tl.arange(0, BK)
        h = fed_back(Y, H0 + state, before, there, live, keep, rows, ks, H, S, GIVEN, RESET)
        w = load_n(W + ks[:, None] + units[None, :] * H, H * H, (ks < H)[:, None] & mine[None, :], G)
        sums = ()
        for g in tl.static_range(G):
            sums = sums + (dot(h, w[g], r[g], PRECISION),)
        r = sums
    at = S32 + state + rows.to(tl.int64)[:, None] * H + units[None, :]
    stride = S * tl.cast(B, tl.int64) * H
    mask = (rows < B)[:, None] & mine[None, :]
    carried = (rows < tl.where(k > 0, B, 0))[:, None] & mine[None, :]
    s = load_n(at, stride, carried, NS)
    if GIVEN:
        given = (rows < tl.where(k > 0, 0, B))[:, None] & mine[None, :]
        s = where_n(k > 0, s, initial(H0 + state, C0 + state, rows, units, given, H, NS, GIVEN), NS)
    if RESET:
        s = where_n(keep[:, None], s, zeros_n(s[0], NS), NS)
    row = rows_at(OFFSETS, t, rows, t >= 0, B, PACKED)
    x = wide_n(load_n(XG + row[:, None] * (XW * H) + units[None, :], H, live[:, None] & mine[None, :], G), G)
    s, tape = advance(x, r, s, p, live, STEP, NS, RAGGED, FAST)
    write(Y, C, XG, row, units, live, rows, s, tape, B, H, S, NS, V, XW, RAGGED, PACKED, SAVE_C, SAVE_TAPE)
    store_n(at, stride, s, mask, NS)
    if k == T - 1:
        finish(HN + state, CN + state, rows, units, s, B, H, NS)


@triton.jit(do_not_specialize=["k", "T", "B", "N", "reverse"], do_not_specialize_on_alignment=MASKS)
def backward(
    W, P, H0, C0, Y, C, TAPE, DY, DHN, DCN, DC, DG, DH0, DC0, DP, S32, LENGTHS, OFFSETS, RESETS, k, T, B, N, H, reverse,
    STEP_BACKWARD: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, XW: tl.constexpr, S: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GIVEN: tl.constexpr, HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, TRAIL: tl.constexpr, RAGGED: tl.constexpr,
    PACKED: tl.constexpr, RESET: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Position k; with LAST, k = T and only the gradients of the initial states remain."""
    stream = tl.program_id(2)
    backwards = (reverse >> stream) & 1
    N = tl.cast(N, tl.int64)
    TAPE += stream * N * (XW * H)
    DG += stream * N * (D * H)
    C += stream * N * H
    DC += stream * N * H
    Y += stream * H
    DY += stream * H
    DP += (stream * tl.num_programs(0) + tl.program_id(0)) * (NP * H)
    W += stream * (G * H * H)
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    mask = (rows < B)[:, None] & mine[None, :]
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    t = (1 - backwards) * (T - 1) + k * (2 * backwards - 1)
    done = t + 1 - 2 * backwards  # the step of the launch before, whose dr goes back through W
    passed = inside(done, length)
    row = rows_at(OFFSETS, done, rows, (done >= 0) & (done < T), B, PACKED)
    last = H
    if RAGGED:
        last = tl.max(passed.to(tl.int32), 0) * H
    dh = through_memory(DG, W, row, passed, last, units, H, G, SPLIT, D, BB, BN, BK, PRECISION)
    if RESET:
        keep = kept(RESETS, OFFSETS, done, rows, length, T, backwards, B, RESET, PACKED)
        dh = tl.where(keep[:, None], dh, 0.0)
    at = S32 + state + rows.to(tl.int64)[:, None] * H + units[None, :]
    stride = S * tl.cast(B, tl.int64) * H
    ends = final_gradients(DHN + state, DCN + state, rows, units, B, H, NS, HAS_DH, HAS_DC)
    carried = (rows < tl.where(k > 0, B, 0))[:, None] & mine[None, :]
    ds = where_n(k > 0, load_n(at, stride, carried, NS), ends, NS)
    ds = add_first(ds, dh, NS)
    if LAST:
        finish(DH0 + state, DC0 + state, rows, units, ds, B, H, NS)
    else:
        live = t < length
        here = live[:, None] & mine[None, :]
        row = rows_at(OFFSETS, t, rows, t >= 0, B, PACKED)
        tape = wide_n(load_n(TAPE + row[:, None] * (XW * H) + units[None, :], H, here, V), V)
        ds = from_above(DY, DC, ds, row, units, here, H, S, NS, TRAIL)
        new = history(Y, C, row, units, here, H, S, NS)
        previous = t - 1 + 2 * backwards
        there = inside(previous, length)
        before = rows_at(OFFSETS, previous, rows, (previous >= 0) & (previous < T), B, PACKED)
        s = history(Y, C, before, units, there[:, None] & mine[None, :], H, S, NS)
        if GIVEN:
            edge = (live & (there == 0))[:, None] & mine[None, :]
            s = where_n(there[:, None], s, initial(H0 + state, C0 + state, rows, units, edge, H, NS, GIVEN), NS)
        keep = kept(RESETS, OFFSETS, t, rows, length, T, backwards, B, RESET, PACKED)
        dx, dr, ds, dp = retreat(tape, s, new, p, ds, live, keep, STEP_BACKWARD, G, NS, NP, RAGGED, RESET, FAST)
        written = rows < B
        if PACKED:
            written = live
        write_gradients(DG, row, units, written, dx, dr, H, G, SPLIT, D)
        add_sums(DP, dp, units, H, NP)
        store_n(at, stride, ds, mask, NS)
