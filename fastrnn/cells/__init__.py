"""The cells, by name. Tests, benchmarks and backends iterate over `CELLS`."""

from fastrnn.cells.base import Cell
from fastrnn.cells.gru import GRU
from fastrnn.cells.lstm import LSTM
from fastrnn.cells.rnn import RNN_RELU, RNN_TANH

CELLS: dict[str, Cell] = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)}

__all__ = ["CELLS", "Cell"]
