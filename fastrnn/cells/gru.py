"""Gated recurrent unit, in PyTorch's gate order r, z, n and with its reset gate after the product.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)           reset gate
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)           update gate
    n_t = tanh   (W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))   candidate
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014; the variant
with r_t outside the product is that of cuDNN and PyTorch.
"""

from fastrnn.cells.base import Cell


def step(x, r, s, p, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    rt = sigmoid(x[0] + r[0])
    z = sigmoid(x[1] + r[1])
    n = tanh(x[2] + rt * r[2])
    return (n + z * (s[0] - n),), (rt, z, n, r[2])


def step_backward(tape, s, s1, p, ds, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    rt, z, n, hn = tape
    dn = ds[0] * (1 - z) * (1 - n * n)
    dz = ds[0] * (s[0] - n) * z * (1 - z)
    dr = dn * hn * rt * (1 - rt)
    return (dr, dz, dn), (dr, dz, dn * rt), (ds[0] * z,), ()


GRU = Cell("gru", step, step_backward, gates=3, states=1, tape=4, split=(2,))
