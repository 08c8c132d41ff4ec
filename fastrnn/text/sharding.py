"""FSDP2: each process holds its share of the weights, of their gradients and of the optimiser's state.

Checkpoints are whole, one file as with any other strategy, so a sharded run's model loads anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from . import checkpoint as checkpoints

FORWARDS = ("loss",)  # what training steps call beside forward()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with our way to read checkpoints, checked first, and optimisers of which some
    parameters or all have no state: frozen ones, and those of plain SGD."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # by `load_optimizer_state_dict`

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, as of one process, on the CPU; all processes must call it, and the first one keeps it."""
        return tree_map_only(DTensor, self._whole, optimizer.state_dict())  # type: ignore[no-any-return]

    def _whole(self, part: DTensor) -> Tensor:
        tensor = part.full_tensor()
        return tensor.cpu() if self.global_rank == 0 else tensor.new_empty(0)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = checkpoints.load(checkpoint_path)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: shares(parameters[i], own) for i, own in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})


def shares(parameter: DTensor, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part of what an optimiser keeps of `parameter`: tensors of its shape lie as it does."""

    def share(whole: Tensor) -> Tensor:
        if whole.shape != parameter.shape:
            return whole  # a number of steps
        there = whole.to(parameter.device)
        return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return tree_map_only(Tensor, share, state)  # type: ignore[no-any-return]


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards `model`, in place, as one group over `mesh`: recurrent models have few and large weights."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(model, mesh=mesh["data_parallel"])
    for name in FORWARDS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
