"""Which library's recurrent layers, and ragged batches through either."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def recurrent_class(layer: str, cell: str) -> type[nn.Module]:
    """The module class of `cell` ("lstm", "gru", "rnn") by `layer` ("fastrnn" or "torch")."""
    import fastrnn

    library = nn if layer == "torch" else fastrnn
    found: type[nn.Module] = getattr(library, cell.upper())
    return found


def run_ragged(rnn: nn.Module, x: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Any]:
    """Outputs (T, B, H), zero beyond each length, and the last states.

    Args:
        x: (T, B, I), padded.
        lengths: (B,), on any device; at least 1.
        packed: by PackedSequence, as torch.nn's layers need it; else by fastrnn's `lengths=`.
    """
    if not packed:
        y, state = rnn(x, lengths=lengths)
        return y, state
    y, state = rnn(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False))
    return pad_packed_sequence(y, total_length=len(x))[0], state
