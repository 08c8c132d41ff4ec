"""What the kernels of all schedules share: one step of any cell, and the rows that it reads and writes.

    rows     [BB]  a tile of batch rows                 units  [n]  a tile of hidden units
    length   [BB]  the rows' lengths, T where all are equal, 0 beyond the batch
    t              the time step; position k of the loop is t = k forward, longest - 1 - k in reverse
    row      [BB]  int64, where (t, rows) lies: t * B + rows, or OFFSETS[t] + rows in a packed batch
    s, ds          tuples of the cell's states and of their gradients, fp32 [BB, n]

Tensors are those of `fastrnn.backends.triton.launch`, already moved to the stream. Loads of rows that are not
live give zeros. Where the batch is padded, y, c and the gradients at the gates are written as zero there.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which multiplies the bit patterns of bf16, and adds up fp16 in fp16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def narrow(v, TYPE: tl.constexpr):
    """To a narrower type, to the nearest even."""
    if INTERPRETED and TYPE == tl.bfloat16:  # to which it does not round; what is left fits exactly
        bits = v.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        v = tl.where(v == v, rounded, v)
    return v.to(TYPE)


@triton.jit
def wide(v):
    """To fp32."""
    if INTERPRETED and v.dtype == tl.bfloat16:  # whose cast is arithmetic on bit patterns
        v = (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def where(c, a, b):
    return tl.where(c, a, b)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """To 2e-7 of its value; the quotient alone would lose it near zero."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    q = x * x
    near = x * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def tanh_approx(x):
    """The hardware's, to 2^-11: for values that are rounded to 16 bits."""
    if INTERPRETED:
        y = tanh(x)
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def load_n(p, stride, mask, N: tl.constexpr):
    """N blocks, `stride` elements apart, as they are."""
    out = ()
    for g in tl.static_range(N):
        out = out + (tl.load(p + g * stride, mask=mask, other=0.0),)
    return out


@triton.jit
def wide_n(a, N: tl.constexpr):
    out = ()
    for g in tl.static_range(N):
        out = out + (wide(a[g]),)
    return out


@triton.jit
def zeros_n(like, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros_like(like),)
    return out


@triton.jit
def where_n(c, a, b, N: tl.constexpr):
    out = ()
    for g in tl.static_range(N):
        out = out + (tl.where(c, a[g], b[g]),)
    return out


@triton.jit
def store_n(p, stride, values, mask, N: tl.constexpr):
    for g in tl.static_range(N):
        tl.store(p + g * stride, narrow(values[g], p.dtype.element_ty), mask=mask)


@triton.jit
def lengths_of(LENGTHS, rows, T, B, RAGGED: tl.constexpr):
    if RAGGED:
        length = tl.load(LENGTHS + rows, mask=rows < B, other=0).to(tl.int32)
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
def advance(x, r, s, live, STEP: tl.constexpr, NS: tl.constexpr, RAGGED: tl.constexpr, FAST: tl.constexpr):
    """One step; rows that are not live keep their state."""
    if FAST:
        new, tape = STEP(x, r, s, (), sigmoid, tanh_approx, where)
    else:
        new, tape = STEP(x, r, s, (), sigmoid, tanh, where)
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
    ds,
    live,
    keep,
    STEP_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    NS: tl.constexpr,
    RAGGED: tl.constexpr,
    RESET: tl.constexpr,
    FAST: tl.constexpr,
):
    """The derivative of one step: dx, dr and ds without the part that goes through r."""
    if RESET:
        s = where_n(keep[:, None], s, zeros_n(s[0], NS), NS)
    own = ds
    if RAGGED:
        own = where_n(live[:, None], ds, zeros_n(s[0], NS), NS)
    if FAST:
        dx, dr, before, _ = STEP_BACKWARD(tape, s, new, (), own, sigmoid, tanh_approx, where)
    else:
        dx, dr, before, _ = STEP_BACKWARD(tape, s, new, (), own, sigmoid, tanh, where)
    if RAGGED:
        before = where_n(live[:, None], before, ds, NS)
        dx = where_n(live[:, None], dx, zeros_n(dx[0], G), G)
        dr = where_n(live[:, None], dr, zeros_n(dr[0], G), G)
    if RESET:
        before = where_n(keep[:, None], before, zeros_n(before[0], NS), NS)
    return dx, dr, before


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
def write_gradients(DG, row, units, there, dx, dr, H, G: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr):
    """dgates of one step: dx of every gate, then dr of the split ones, which are the last."""
    at = DG + row[:, None] * (D * H) + units[None, :]
    mask = there[:, None] & (units < H)[None, :]
    store_n(at, H, dx, mask, G)
    for i in tl.static_range(SPLIT):
        tl.store(at + (G + i) * H, narrow(dr[G - SPLIT + i], DG.dtype.element_ty), mask=mask)
