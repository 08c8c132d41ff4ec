"""What the kernels of all schedules share: one step of any cell, and the rows that it reads and writes.

    rows     [BB]  a tile of batch rows                 units  [n]  a tile of hidden units
    length   [BB]  the rows' lengths, T where all are equal, 0 beyond the batch
    t              the time step; position k of the loop is t = k forward, longest - 1 - k in reverse
    row      [BB]  int64, where (t, rows) lies: t * B + rows, or OFFSETS[t] + rows in a packed batch
    s, ds          tuples of the cell's states and of their gradients, fp32 [BB, n]
    p, dp          tuples of its NP per-unit parameters, fp32 [1, n], and of their gradients [BB, n], a row each

Tensors are those of `fastrnn.backends.triton.launch`, already moved to the stream. Loads of rows that are not
live give zeros. Where the batch is padded, y, c and the gradients at the gates are written as zero there.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from fastrnn.backends.triton.values import (
    dot,
    load_n,
    narrow,
    sigmoid,
    store_n,
    tanh,
    tanh_approx,
    where,
    where_n,
    wide,
    wide_n,
    zeros_n,
)

MASKS = ("LENGTHS", "OFFSETS", "RESETS")  # parts of other tensors: no variant of their own for odd addresses


@triton.jit
def lengths_of(LENGTHS, rows, T, B, RAGGED: tl.constexpr):
    if RAGGED:
        length = tl.load(LENGTHS + rows, mask=rows < B, other=0)
        # Values on the device are checked there, later: whatever they are, nothing beyond the batch may be touched.
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    else:
        length = tl.where(rows < B, T, 0)
    return length


@triton.jit
def inside(t, length):
    """The rows that have a step t, which may lie before the first."""
    return tl.where(t < 0, 0x7FFFFFFF, t) < length


@triton.jit
def rows_at(OFFSETS, t, rows, exists, B, PACKED: tl.constexpr):
    """`row` of step t; of no meaning where that step does not exist."""
    if PACKED:
        first = tl.load(OFFSETS + t, mask=exists, other=0)
    else:
        first = tl.cast(t, tl.int64) * B
    return first + rows


@triton.jit
def kept(RESETS, OFFSETS, t, rows, length, longest, backwards, B, RESET: tl.constexpr, PACKED: tl.constexpr):
    """Does the state go into step t as it is? Otherwise it is cleared: at t forward, between t + 1 and t in reverse."""
    boundary = t + backwards
    if RESET:
        row = rows_at(OFFSETS, boundary, rows, boundary < longest, B, PACKED)
        keep = tl.load(RESETS + row, mask=boundary < length, other=0) == 0
    else:
        keep = rows >= 0
    return keep


@triton.jit
def initial(H0, C0, rows, units, mask, H, NS: tl.constexpr, GIVEN: tl.constexpr):
    """The initial states where `mask`, zero elsewhere."""
    s = zeros_n(tl.zeros([rows.shape[0], units.shape[0]], tl.float32), NS)
    if GIVEN:
        at = tl.cast(rows, tl.int64)[:, None] * H + units[None, :]
        h = wide(tl.load(H0 + at, mask=mask, other=0.0))
        if NS == 2:
            s = (h, wide(tl.load(C0 + at, mask=mask, other=0.0)))
        else:
            s = (h,)
    return s


@triton.jit
def history(Y, C, row, units, mask, H, S: tl.constexpr, NS: tl.constexpr):
    """The states after the step of `row`, where `mask`."""
    h = wide(tl.load(Y + row[:, None] * (S * H) + units[None, :], mask=mask, other=0.0))
    if NS == 2:
        s = (h, tl.load(C + row[:, None] * H + units[None, :], mask=mask, other=0.0))
    else:
        s = (h,)
    return s


@triton.jit
def fed_back(
    Y, H0, row, there, live, keep, rows, ks, H, S: tl.constexpr, GIVEN: tl.constexpr, RESET: tl.constexpr
):  # fmt: skip
    """Units ks of the h that enters a step, from y's `row` of the step before or from the initial state."""
    entering = live
    if RESET:
        entering = live & keep
    mask = (entering & there)[:, None] & (ks < H)[None, :]
    # Not from the first-level cache: other programs have written it since.
    h = tl.load(Y + row[:, None] * (S * H) + ks[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    if GIVEN:
        mask = (entering & (there == 0))[:, None] & (ks < H)[None, :]
        h0 = tl.load(H0 + tl.cast(rows, tl.int64)[:, None] * H + ks[None, :], mask=mask, other=0.0)
        h = tl.where(there[:, None], h, h0)
    return h


@triton.jit
def own_values(P, units, H, NP: tl.constexpr):
    """The cell's per-unit parameters, from (NP, H)."""
    return wide_n(load_n(P + units[None, :], H, (units < H)[None, :], NP), NP)


@triton.jit
def advance(x, r, s, p, live, STEP: tl.constexpr, NS: tl.constexpr, RAGGED: tl.constexpr, FAST: tl.constexpr):
    """One step; rows that are not live keep their state."""
    if FAST:
        new, tape = STEP(x, r, s, p, sigmoid, tanh_approx, where)
    else:
        new, tape = STEP(x, r, s, p, sigmoid, tanh, where)
    if RAGGED:
        new = where_n(live[:, None], new, s, NS)
    return new, tape


@triton.jit
def write(
    Y,
    C,
    TAPE,
    row,
    units,
    live,
    rows,
    new,
    tape,
    B,
    H,
    S: tl.constexpr,
    NS: tl.constexpr,
    V: tl.constexpr,
    XW: tl.constexpr,
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE_C: tl.constexpr,
    SAVE_TAPE: tl.constexpr,
):
    """Outputs of one step."""
    if PACKED:
        there = live
    else:
        there = rows < B
    mask = there[:, None] & (units < H)[None, :]
    if RAGGED and not PACKED:
        new = where_n(live[:, None], new, zeros_n(new[0], NS), NS)
    tl.store(Y + row[:, None] * (S * H) + units[None, :], narrow(new[0], Y.dtype.element_ty), mask=mask)
    if SAVE_C:
        tl.store(C + row[:, None] * H + units[None, :], new[NS - 1], mask=mask)
    if SAVE_TAPE:
        store_n(TAPE + row[:, None] * (XW * H) + units[None, :], H, tape, mask, V)


@triton.jit
def finish(HN, CN, rows, units, s, B, H, NS: tl.constexpr):
    """The final states."""
    at = tl.cast(rows, tl.int64)[:, None] * H + units[None, :]
    mask = (rows < B)[:, None] & (units < H)[None, :]
    tl.store(HN + at, narrow(s[0], HN.dtype.element_ty), mask=mask)
    if NS == 2:
        tl.store(CN + at, narrow(s[1], CN.dtype.element_ty), mask=mask)


@triton.jit
def final_gradients(DHN, DCN, rows, units, B, H, NS: tl.constexpr, HAS_DH: tl.constexpr, HAS_DC: tl.constexpr):
    """Gradients of the final states, zero where none is given."""
    at = tl.cast(rows, tl.int64)[:, None] * H + units[None, :]
    mask = (rows < B)[:, None] & (units < H)[None, :]
    dh = tl.zeros([rows.shape[0], units.shape[0]], tl.float32)
    dc = dh
    if HAS_DH:
        dh = wide(tl.load(DHN + at, mask=mask, other=0.0))
    if HAS_DC:
        dc = wide(tl.load(DCN + at, mask=mask, other=0.0))
    if NS == 2:
        ds = (dh, dc)
    else:
        ds = (dh,)
    return ds


@triton.jit
def add_first(ds, dh, NS: tl.constexpr):
    """ds with dh added to the gradient of h."""
    if NS == 2:
        ds = (ds[0] + dh, ds[1])
    else:
        ds = (ds[0] + dh,)
    return ds


@triton.jit
def from_above(DY, DC, ds, row, units, mask, H, S: tl.constexpr, NS: tl.constexpr, TRAIL: tl.constexpr):
    """ds with the gradients of this step's own outputs."""
    ds = add_first(ds, wide(tl.load(DY + row[:, None] * (S * H) + units[None, :], mask=mask, other=0.0)), NS)
    if TRAIL:
        ds = (ds[0], ds[1] + wide(tl.load(DC + row[:, None] * H + units[None, :], mask=mask, other=0.0)))
    return ds


@triton.jit
def retreat(
    tape,
    s,
    new,
    p,
    ds,
    live,
    keep,
    STEP_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    NS: tl.constexpr,
    NP: tl.constexpr,
    RAGGED: tl.constexpr,
    RESET: tl.constexpr,
    FAST: tl.constexpr,
):
    """The derivative of one step: dx, dr, ds without the part that goes through r, and dp."""
    if RESET:
        s = where_n(keep[:, None], s, zeros_n(s[0], NS), NS)
    own = ds
    if RAGGED:
        own = where_n(live[:, None], ds, zeros_n(s[0], NS), NS)
    if FAST:
        dx, dr, before, dp = STEP_BACKWARD(tape, s, new, p, own, sigmoid, tanh_approx, where)
    else:
        dx, dr, before, dp = STEP_BACKWARD(tape, s, new, p, own, sigmoid, tanh, where)
    if RAGGED:
        before = where_n(live[:, None], before, ds, NS)
        dx = where_n(live[:, None], dx, zeros_n(dx[0], G), G)
        dr = where_n(live[:, None], dr, zeros_n(dr[0], G), G)
    dp = where_n(live[:, None], dp, zeros_n(ds[0], NP), NP)
    if RESET:
        before = where_n(keep[:, None], before, zeros_n(before[0], NS), NS)
    return dx, dr, before, dp


@triton.jit
def through_memory(
    DG, W, row, passed, last, units, H, G: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of h from the dr of the step in `row`, W_hh block by block; of no row if `last` is 0, else H."""
    dh = tl.zeros([BB, BN], tl.float32)
    for g in tl.static_range(G):
        column = (g + SPLIT * (g >= G - SPLIT)) * H
        for first in range(0, last, BK):
            ks = first + tl.arange(0, BK)
            there = passed[:, None] & (ks < H)[None, :]
            at = DG + row[:, None] * (D * H) + column + ks[None, :]
            d = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            at = W + g * H * H + ks[:, None] * H + units[None, :]
            w = tl.load(at, mask=(ks < H)[:, None] & (units < H)[None, :], other=0.0)
            dh = dot(d, w, dh, PRECISION)
    return dh


@triton.jit
def add_sums(DP, dp, units, H, NP: tl.constexpr):
    """Adds the sums over the rows to this program's part of the parameters' gradients, (NP, H)."""
    for g in tl.static_range(NP):
        at = DP + g * H + units
        mask = units < H
        tl.store(at, tl.load(at, mask=mask, other=0.0) + tl.sum(dp[g], 0), mask=mask)


@triton.jit
def write_gradients(DG, row, units, there, dx, dr, H, G: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr):
    """dgates of one step: dx of every gate, then dr of the split ones, which are the last."""
    at = DG + row[:, None] * (D * H) + units[None, :]
    mask = there[:, None] & (units < H)[None, :]
    store_n(at, H, dx, mask, G)
    for i in tl.static_range(SPLIT):
        tl.store(at + (G + i) * H, narrow(dr[G - SPLIT + i], DG.dtype.element_ty), mask=mask)
