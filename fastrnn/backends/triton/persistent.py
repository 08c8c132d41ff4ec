"""Middle H: one launch; each program keeps the columns of W_hh of its units, and a barrier a step exchanges h.

Tensors as in `resident`, and ARRIVED (S, batch tiles) int32, zero at the launch: the programs of one batch tile and
stream count themselves in there at every step. Grid: (batch tiles, unit tiles, S), launched so that all programs run
at once; a wait ends after `limit` looks all the same, sets ERROR, and what follows is NaN.
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
from fastrnn.backends.triton.values import add_n, dot, load_n, where_n, wide_n, zeros_n


@triton.jit
def arrive(ARRIVED):
    """This program has written its part of the step."""
    tl.debug_barrier()  # all of its threads have
    tl.atomic_add(ARRIVED, 1, sem="release", scope="gpu")


@triton.jit
def wait(ARRIVED, ERROR, target, limit):
    """Until `target` programs have arrived; the limit for further waits, zero once one has gone wrong."""
    seen = tl.atomic_add(ARRIVED, 0, sem="acquire", scope="gpu")
    looks = 0
    while (seen < target) & (looks < limit):
        seen = tl.atomic_add(ARRIVED, 0, sem="acquire", scope="gpu")
        looks += 1
    if seen < target:
        tl.store(ERROR, 1)
    tl.debug_barrier()
    return tl.where(seen < target, 0, limit)


@triton.jit
def spoil(values, sound, N: tl.constexpr):
    """NaN in the place of what a wait without an end would have made wrong."""
    out = ()
    for g in tl.static_range(N):
        out = out + (tl.where(sound, values[g], float("nan")),)
    return out


@triton.jit
def stationary(W, units, H, OUT: tl.constexpr, IN: tl.constexpr, G: tl.constexpr, NK: tl.constexpr, BK: tl.constexpr):
    """Blocks [BK, units] of every gate's weights, OUT and IN the strides of W_hh's rows and columns."""
    w = ()
    for c in tl.static_range(NK):
        ks = c * BK + tl.arange(0, BK)
        mask = (ks < H)[:, None] & (units < H)[None, :]
        w = w + load_n(W + ks[:, None] * IN + units[None, :] * OUT, H * H, mask, G)
    return w


@triton.jit(do_not_specialize=["T", "B", "N", "reverse", "limit"], do_not_specialize_on_alignment=MASKS)
def forward(
    XG, W, BIAS, P, H0, C0, Y, HN, CN, C, LENGTHS, OFFSETS, RESETS, ARRIVED, ERROR, T, B, N, H, reverse, limit,
    STEP: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, XW: tl.constexpr,
    S: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, GIVEN: tl.constexpr,
    BIASED: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr, RESET: tl.constexpr, SAVE_C: tl.constexpr,
    SAVE_TAPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(2)
    backwards = (reverse >> stream) & 1
    N = tl.cast(N, tl.int64)
    XG += stream * N * (XW * H)
    C += stream * N * H
    Y += stream * H
    ARRIVED += stream * tl.num_programs(0) + tl.program_id(0)
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    longest = T
    if RAGGED:
        longest = tl.max(length, 0)
    w = stationary(W + stream * (G * H * H), units, H, H, 1, G, NK, BK)
    if BIASED:
        bias = wide_n(load_n(BIAS + stream * (G * H) + units, H, mine, G), G)
    s = initial(H0 + state, C0 + state, rows, units, (rows < B)[:, None] & mine[None, :], H, NS, GIVEN)
    for k in range(longest):
        t = k + backwards * (longest - 1 - 2 * k)
        live = t < length
        row = rows_at(OFFSETS, t, rows, t >= 0, B, PACKED)
        x = load_n(XG + row[:, None] * (XW * H) + units[None, :], H, live[:, None] & mine[None, :], G)
        keep = kept(RESETS, OFFSETS, t, rows, length, longest, backwards, B, RESET, PACKED)
        previous = t - 1 + 2 * backwards
        there = inside(previous, length)
        before = rows_at(OFFSETS, previous, rows, (previous >= 0) & (previous < longest), B, PACKED)
        r = zeros_n(s[0], G)
        if BIASED:
            r = ()
            for g in tl.static_range(G):
                r = r + (tl.zeros_like(s[0]) + bias[g][None, :],)
        if k > 0:
            limit = wait(ARRIVED, ERROR, tl.num_programs(1) * k, limit)
        for c in tl.static_range(NK):
            ks = c * BK + tl.arange(0, BK)
            h = fed_back(Y, H0 + state, before, there, live, keep, rows, ks, H, S, GIVEN, RESET)
            sums = ()
            for g in tl.static_range(G):
                sums = sums + (dot(h, w[c * G + g], r[g], PRECISION),)
            r = sums
        if RESET:
            s = where_n(keep[:, None], s, zeros_n(s[0], NS), NS)
        s, tape = advance(wide_n(x, G), r, s, p, live, STEP, NS, RAGGED, FAST)
        s = spoil(s, limit > 0, NS)
        write(Y, C, XG, row, units, live, rows, s, tape, B, H, S, NS, V, XW, RAGGED, PACKED, SAVE_C, SAVE_TAPE)
        arrive(ARRIVED)
    finish(HN + state, CN + state, rows, units, s, B, H, NS)
    if RAGGED and not PACKED:
        for late in range(longest, T):
            row = rows_at(OFFSETS, late, rows, late < T, B, PACKED)
            none = zeros_n(s[0], NS)
            write(Y, C, XG, row, units, rows < 0, rows, none, none, B, H, S, NS, V, XW, RAGGED, PACKED, SAVE_C, False)


@triton.jit
def through(
    DG, w, row, passed, H, G: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of h from the dr of the step in `row`."""
    dh = tl.zeros([BB, BN], tl.float32)
    for c in tl.static_range(NK):
        ks = c * BK + tl.arange(0, BK)
        mask = passed[:, None] & (ks < H)[None, :]
        for g in tl.static_range(G):
            column = (g + SPLIT * (g >= G - SPLIT)) * H
            at = DG + row[:, None] * (D * H) + column + ks[None, :]
            d = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            dh = dot(d, w[c * G + g], dh, PRECISION)
    return dh


@triton.jit(do_not_specialize=["T", "B", "N", "reverse", "limit"], do_not_specialize_on_alignment=MASKS)
def backward(
    W, P, H0, C0, Y, C, TAPE, DY, DHN, DCN, DC, DG, DH0, DC0, DP, LENGTHS, OFFSETS, RESETS, ARRIVED, ERROR,
    T, B, N, H, reverse, limit,
    STEP_BACKWARD: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, XW: tl.constexpr, S: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NK: tl.constexpr, GIVEN: tl.constexpr, HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, TRAIL: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr, RESET: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
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
    ARRIVED += stream * tl.num_programs(0) + tl.program_id(0)
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.program_id(1) * BN + tl.arange(0, BN)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    longest = T
    if RAGGED:
        longest = tl.max(length, 0)
    w = stationary(W + stream * (G * H * H), units, H, 1, H, G, NK, BK)
    dps = zeros_n(tl.zeros([BB, BN], tl.float32), NP)
    ds = final_gradients(DHN + state, DCN + state, rows, units, B, H, NS, HAS_DH, HAS_DC)
    t = (1 - backwards) * (longest - 1)
    row = rows_at(OFFSETS, t, rows, longest > 0, B, PACKED)
    new = history(Y, C, row, units, inside(t, length)[:, None] & mine[None, :], H, S, NS)
    live, keep = rows < 0, rows < 0  # of the step before the first
    for k in range(longest):
        done, passed, kept_done = row, live, keep  # the step before this one; at k = 0 there is none
        t = (1 - backwards) * (longest - 1) + k * (2 * backwards - 1)
        row = rows_at(OFFSETS, t, rows, t >= 0, B, PACKED)
        live = t < length
        mask = live[:, None] & mine[None, :]
        tape = wide_n(load_n(TAPE + row[:, None] * (XW * H) + units[None, :], H, mask, V), V)
        keep = kept(RESETS, OFFSETS, t, rows, length, longest, backwards, B, RESET, PACKED)
        ds = from_above(DY, DC, ds, row, units, mask, H, S, NS, TRAIL)
        previous = t - 1 + 2 * backwards
        there = inside(previous, length)
        at = rows_at(OFFSETS, previous, rows, (previous >= 0) & (previous < longest), B, PACKED)
        before = history(Y, C, at, units, there[:, None] & mine[None, :], H, S, NS)
        s = before
        if GIVEN:
            edge = (live & (there == 0))[:, None] & mine[None, :]
            s = where_n(there[:, None], before, initial(H0 + state, C0 + state, rows, units, edge, H, NS, GIVEN), NS)
        if k > 0:
            limit = wait(ARRIVED, ERROR, tl.num_programs(1) * k, limit)
        dh = through(DG, w, done, passed, H, G, SPLIT, D, BB, BN, BK, NK, PRECISION)
        if RESET:
            dh = tl.where(kept_done[:, None], dh, 0.0)
        ds = add_first(ds, dh, NS)
        dx, dr, ds, dp = retreat(tape, s, new, p, ds, live, keep, STEP_BACKWARD, G, NS, NP, RAGGED, RESET, FAST)
        dx, dr = spoil(dx, limit > 0, G), spoil(dr, limit > 0, G)
        if NP > 0:
            dps = add_n(dps, dp, NP)
        written = rows < B
        if PACKED:
            written = live
        write_gradients(DG, row, units, written, dx, dr, H, G, SPLIT, D)
        arrive(ARRIVED)
        new = before
    add_sums(DP, spoil(dps, limit > 0, NP), units, H, NP)
    if GIVEN:
        limit = wait(ARRIVED, ERROR, tl.num_programs(1) * longest, limit)
        # Not `through`: a second use of the weights kept makes the compiler move them all to registers.
        W += stream * (G * H * H)
        dh = through_memory(DG, W, row, live, H, units, H, G, SPLIT, D, BB, BN, BK, PRECISION)
        if RESET:
            dh = tl.where(keep[:, None], dh, 0.0)
        ds = spoil(add_first(ds, dh, NS), limit > 0, NS)
        finish(DH0 + state, DC0 + state, rows, units, ds, B, H, NS)
    if RAGGED and not PACKED:
        for late in range(longest, T):
            row = rows_at(OFFSETS, late, rows, late < T, B, PACKED)
            none = zeros_n(ds[0], G)
            write_gradients(DG, row, units, rows < B, none, none, H, G, SPLIT, D)
