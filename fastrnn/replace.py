"""Swap every torch.nn recurrent module of a model for fastrnn's, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fastrnn import cells_modules, modules
from fastrnn.backends import check_name

COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cells_modules.RNNCell,
    nn.LSTMCell: cells_modules.LSTMCell,
    nn.GRUCell: cells_modules.GRUCell,
}
_OURS = (modules.Recurrent, cells_modules.RecurrentCell)


class Swap(NamedTuple):
    """One recurrent module of the model."""

    name: str  # its qualified name, "" for the model itself
    kind: str  # the class that it had
    note: str = ""  # what was lost, or why it was not swapped


class Report(list[Swap]):
    """The modules that were swapped, with those that were not in `skipped` and the model in `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.skipped: list[Swap] = []

    def __repr__(self) -> str:
        lines = [f"{len(self)} swapped, {len(self.skipped)} skipped"]
        for mark, swaps in (("swapped", self), ("skipped", self.skipped)):
            for s in swaps:
                lines.append(
                    f"  {mark} {s.name or '(the model itself)'}: {s.kind}" + (f" ({s.note})" if s.note else "")
                )
        return "\n".join(lines)


def replace(model: nn.Module, *, backend: str = "auto") -> Report:
    """Swap every torch.nn.RNN, LSTM, GRU and cell in `model` for fastrnn's, in place.

    The new modules hold the same Parameter objects (an optimizer made before stays valid), and keep the
    training mode and the hooks. Subclasses of torch.nn's modules are left alone and reported, as their own
    code would be lost; so are parametrized modules, which are subclasses too: replace first, parametrize after.
    A reference to the old module that the model keeps elsewhere than among its submodules is not seen.

    Args:
        model: any module. If it is itself a torch.nn recurrent module, it cannot be changed in place:
            take the new one from the report's `model`.
        backend: "auto" or a backend's name, given to every new module.

    Returns:
        A list of what was swapped; `.skipped` lists what was not and why, `.model` is the model.

    Raises:
        TypeError: `model` is no module. ValueError: no backend has this name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_name(backend)
    report = Report(model)
    made: dict[int, nn.Module] = {}
    names = dict(model.named_modules())  # shared modules once
    for name, old in names.items():
        new_type = COUNTERPARTS.get(type(old))
        if new_type is not None:
            made[id(old)], note = _convert(old, new_type, backend)
            report.append(Swap(name, f"torch.nn.{type(old).__name__}", note))
        elif isinstance(old, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(old, _OURS):
            report.skipped.append(Swap(name, type(old).__name__, "a subclass of torch.nn's module"))
    for parent in names.values():
        for key, child in parent._modules.items():
            if id(child) in made:
                parent._modules[key] = made[id(child)]
    report.model = made.get(id(model), model)
    return report


def _convert(old: nn.Module, new_type: type[nn.Module], backend: str) -> tuple[nn.Module, str]:
    new = new_type.__new__(new_type)
    state: dict[str, Any] = {
        # Containers are copied, what they hold (parameters, hooks) is shared.
        key: value.copy() if isinstance(value, dict) else value
        for key, value in old.__dict__.items()
        if key not in ("_flat_weights", "_flat_weight_refs")
    }
    if isinstance(old, nn.RNNBase):
        state["_flat_weight_refs"] = []
    lost = []
    for key in ("_load_state_dict_pre_hooks", "_state_dict_pre_hooks"):
        for handle, hook in list(state.get(key, {}).items()):
            if getattr(hook, "with_module", False):  # bound to the old module, which is about to die
                del state[key][handle]
                lost.append(f"lost {key.strip('_')}: {getattr(hook, '__name__', hook)}")
    new.__dict__.update(state)
    new.backend = backend  # type: ignore[assignment]
    return new, "; ".join(lost)
