"""Values in the Triton kernels: products, rounding and activations, as the interpreter needs them too, and tuples."""

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
def add_n(a, b, N: tl.constexpr):
    out = ()
    for g in tl.static_range(N):
        out = out + (a[g] + b[g],)
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
