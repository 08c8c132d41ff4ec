"""The simple recurrent network, with tanh or relu.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      rnn_tanh
    h_t = relu(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      rnn_relu

Elman, "Finding Structure in Time", Cognitive Science 14(2), 1990. Neither needs a tape: the
derivative follows from h_t.
"""

from fastrnn.cells.base import Cell


def step_tanh(x, r, s, p, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    return (tanh(x[0] + r[0]),), ()


def step_tanh_backward(tape, s, s1, p, ds, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    d = ds[0] * (1 - s1[0] * s1[0])
    return (d,), (d,), (ds[0] * 0,), ()


def step_relu(x, r, s, p, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    a = x[0] + r[0]
    return (where(a <= 0, 0.0, a),), ()  # in this form a NaN stays a NaN


def step_relu_backward(tape, s, s1, p, ds, sigmoid, tanh, where):  # type: ignore[no-untyped-def]
    d = where(s1[0] <= 0, 0.0, ds[0])
    return (d,), (d,), (ds[0] * 0,), ()


RNN_TANH = Cell("rnn_tanh", step_tanh, step_tanh_backward, gates=1, states=1, tape=0)
RNN_RELU = Cell("rnn_relu", step_relu, step_relu_backward, gates=1, states=1, tape=0)
