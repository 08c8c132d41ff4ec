"""Small H: one program per batch tile and stream runs the whole sequence, W_hh and the states on the chip.

    XG   (S, N, XW*H)  x W_ih^T + b, gate by gate; the tape takes its place when it is saved
    W    (S, G*H, H)   BIAS (S, G*H)   H0, C0, HN, CN (S, B, H)   Y, DY (N, S*H)   C, DC (S, N, H)   DG (S, N, D*H)

N rows: T * B of a padded batch, the tokens of a packed one. Grid: (batch tiles, S).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from fastrnn.backends.triton.steps import (
    MASKS,
    add_first,
    add_sums,
    advance,
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
    write,
    write_gradients,
)
from fastrnn.backends.triton.values import add_n, dot, load_n, narrow, where_n, wide_n, zeros_n


@triton.jit(do_not_specialize=["T", "B", "N", "reverse"], do_not_specialize_on_alignment=MASKS)
def forward(
    XG, W, BIAS, P, H0, C0, Y, HN, CN, C, LENGTHS, OFFSETS, RESETS, T, B, N, H, reverse,
    STEP: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, XW: tl.constexpr,
    S: tl.constexpr, BB: tl.constexpr, HP: tl.constexpr, GIVEN: tl.constexpr, BIASED: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr, RESET: tl.constexpr, SAVE_C: tl.constexpr, SAVE_TAPE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(1)
    backwards = (reverse >> stream) & 1
    N = tl.cast(N, tl.int64)
    XG += stream * N * (XW * H)
    C += stream * N * H
    Y += stream * H
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.arange(0, HP)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    longest = T
    if RAGGED:
        longest = tl.max(length, 0)
    w = load_n(W + stream * (G * H * H) + units[:, None] + units[None, :] * H, H * H, mine[:, None] & mine[None, :], G)
    if BIASED:
        bias = wide_n(load_n(BIAS + stream * (G * H) + units, H, mine, G), G)
    s = initial(H0 + state, C0 + state, rows, units, (rows < B)[:, None] & mine[None, :], H, NS, GIVEN)
    t = backwards * (longest - 1)
    row = rows_at(OFFSETS, t, rows, longest > 0, B, PACKED)
    mask = inside(t, length)[:, None] & mine[None, :]
    coming = load_n(XG + row[:, None] * (XW * H) + units[None, :], H, mask, G)
    for k in range(longest):
        here, live = row, t < length
        keep = kept(RESETS, OFFSETS, t, rows, length, longest, backwards, B, RESET, PACKED)
        x = wide_n(coming, G)
        t += 1 - 2 * backwards  # the next step's input is on its way during this step's product
        row = rows_at(OFFSETS, t, rows, k + 1 < longest, B, PACKED)
        mask = inside(t, length)[:, None] & mine[None, :]
        coming = load_n(XG + row[:, None] * (XW * H) + units[None, :], H, mask, G)
        if RESET:
            s = where_n(keep[:, None], s, zeros_n(s[0], NS), NS)
        h = narrow(s[0], W.dtype.element_ty)
        r = ()
        for g in tl.static_range(G):
            product = dot(h, w[g], None, PRECISION)
            if BIASED:
                product += bias[g][None, :]
            r = r + (product,)
        s, tape = advance(x, r, s, p, live, STEP, NS, RAGGED, FAST)
        write(Y, C, XG, here, units, live, rows, s, tape, B, H, S, NS, V, XW, RAGGED, PACKED, SAVE_C, SAVE_TAPE)
    finish(HN + state, CN + state, rows, units, s, B, H, NS)
    if RAGGED and not PACKED:  # steps that no row of the tile has
        for late in range(longest, T):
            here = rows_at(OFFSETS, late, rows, late < T, B, PACKED)
            none = zeros_n(s[0], NS)
            write(Y, C, XG, here, units, rows < 0, rows, none, none, B, H, S, NS, V, XW, RAGGED, PACKED, SAVE_C, False)


@triton.jit(do_not_specialize=["T", "B", "N", "reverse"], do_not_specialize_on_alignment=MASKS)
def backward(
    W, P, H0, C0, Y, C, TAPE, DY, DHN, DCN, DC, DG, DH0, DC0, DP, LENGTHS, OFFSETS, RESETS, T, B, N, H, reverse,
    STEP_BACKWARD: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, XW: tl.constexpr, S: tl.constexpr, BB: tl.constexpr, HP: tl.constexpr, GIVEN: tl.constexpr,
    HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, TRAIL: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    RESET: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(1)
    backwards = (reverse >> stream) & 1
    N = tl.cast(N, tl.int64)
    TAPE += stream * N * (XW * H)
    DG += stream * N * (D * H)
    C += stream * N * H
    DC += stream * N * H
    Y += stream * H
    DY += stream * H
    DP += (stream * tl.num_programs(0) + tl.program_id(0)) * (NP * H)
    state = tl.cast(stream, tl.int64) * B * H
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    units = tl.arange(0, HP)
    mine = units < H
    p = own_values(P + stream * (NP * H), units, H, NP)
    length = lengths_of(LENGTHS, rows, T, B, RAGGED)
    longest = T
    if RAGGED:
        longest = tl.max(length, 0)
    w = load_n(W + stream * (G * H * H) + units[:, None] * H + units[None, :], H * H, mine[:, None] & mine[None, :], G)
    dps = zeros_n(tl.zeros([BB, HP], tl.float32), NP)
    ds = final_gradients(DHN + state, DCN + state, rows, units, B, H, NS, HAS_DH, HAS_DC)
    t = (1 - backwards) * (longest - 1)
    row = rows_at(OFFSETS, t, rows, longest > 0, B, PACKED)
    new = history(Y, C, row, units, inside(t, length)[:, None] & mine[None, :], H, S, NS)
    for k in range(longest):
        here, live = row, t < length
        keep = kept(RESETS, OFFSETS, t, rows, length, longest, backwards, B, RESET, PACKED)
        mask = live[:, None] & mine[None, :]
        tape = wide_n(load_n(TAPE + here[:, None] * (XW * H) + units[None, :], H, mask, V), V)
        ds = from_above(DY, DC, ds, here, units, mask, H, S, NS, TRAIL)
        t += 2 * backwards - 1  # to the step before, whose state entered this one
        row = rows_at(OFFSETS, t, rows, (t >= 0) & (t < longest), B, PACKED)
        there = inside(t, length)
        before = history(Y, C, row, units, there[:, None] & mine[None, :], H, S, NS)
        s = before
        if GIVEN:
            edge = (live & (there == 0))[:, None] & mine[None, :]
            first = initial(H0 + state, C0 + state, rows, units, edge, H, NS, GIVEN)
            s = where_n(there[:, None], before, first, NS)
        dx, dr, ds, dp = retreat(tape, s, new, p, ds, live, keep, STEP_BACKWARD, G, NS, NP, RAGGED, RESET, FAST)
        if NP > 0:
            dps = add_n(dps, dp, NP)
        written = rows < B
        if PACKED:
            written = live
        write_gradients(DG, here, units, written, dx, dr, H, G, SPLIT, D)
        dh = tl.zeros_like(ds[0])
        for g in tl.static_range(G):
            dh = dot(narrow(dr[g], W.dtype.element_ty), w[g], dh, PRECISION)
        if RESET:
            dh = tl.where(keep[:, None], dh, 0.0)
        ds = add_first(ds, dh, NS)
        new = before
    add_sums(DP, dps, units, H, NP)
    if GIVEN:
        finish(DH0 + state, DC0 + state, rows, units, ds, B, H, NS)
    if RAGGED and not PACKED:
        for late in range(longest, T):
            here = rows_at(OFFSETS, late, rows, late < T, B, PACKED)
            none = zeros_n(ds[0], G)
            write_gradients(DG, here, units, rows < B, none, none, H, G, SPLIT, D)
