"""Long short-term memory, in PyTorch's gate order i, f, g, o.

    i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)      input gate
    f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)      forget gate
    g_t = tanh   (W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)      candidate
    o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)      output gate
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t)

Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with the
forget gate of Gers, Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12(10), 2000.
"""

from fastrnn.cells.base import Cell


def step(x, r, s, p, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    i = sigmoid(x[0] + r[0])
    f = sigmoid(x[1] + r[1])
    g = tanh(x[2] + r[2])
    o = sigmoid(x[3] + r[3])
    c = f * s[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def step_backward(tape, s, s1, p, ds, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    i, f, g, o = tape
    tc = tanh(s1[1])
    dc = ds[1] + ds[0] * o * (1 - tc * tc)
    di = dc * g * i * (1 - i)
    df = dc * s[1] * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = ds[0] * tc * o * (1 - o)
    d = (di, df, dg, do)
    return d, d, (ds[0] * 0, dc * f), ()


LSTM = Cell("lstm", step, step_backward, gates=4, states=2, tape=4)
