"""FSDP2: each process holds its share of the weights, of their gradients and of the optimiser's state.

Checkpoints are whole, one file as with any other strategy, so a sharded run's model loads anywhere.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from . import checkpoint as checkpoints

FORWARDS = ("loss",)  # what training steps call beside forward()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with our way to read checkpoints: checked first."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoints.load(checkpoint_path)
        found: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only=True)
        return found


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards `model`, in place, as one group over `mesh`: recurrent models have few and large weights."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(model, mesh=mesh["data_parallel"])
    for name in FORWARDS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
