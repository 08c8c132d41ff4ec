"""fastrnn: recurrent layers in the place of torch.nn's, with the same numbers sooner."""

from typing import TYPE_CHECKING, Any

from fastrnn import functional
from fastrnn.backends import backend
from fastrnn.backends.triton.precision import fp32_precision
from fastrnn.backends.watchdog import check_device
from fastrnn.cells_modules import GRUCell, LSTMCell, RNNCell
from fastrnn.explain import explain
from fastrnn.info import info
from fastrnn.modules import GRU, LSTM, RNN
from fastrnn.replace import replace
from fastrnn.tune import tune

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "backend",
    "check_device",
    "explain",
    "fp32_precision",
    "functional",
    "info",
    "replace",
    "tune",
]

__version__: str

if not TYPE_CHECKING:  # to which any name would exist

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("fastrnn")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
