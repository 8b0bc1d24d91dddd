"""The tensors of which a layer's adapters are made: by name, by adapter, in either form, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..contract.config import MethodConfig
from ..ops.probe import Probe
from ..support.sites import Site
from . import dora
from .factor import Factor
from .offload import onloaded


class AdapterTensors(nn.Module):
    """A module that holds for each adapter the parameters of the method's structure, ``FACTOR.NAME.weight``,
    what belongs to the update without being trained, and DoRA's magnitudes.

    Attributes:
        structure: What makes an update of them.
        site: The module that is adapted.
        configs, probes: By adapter.
        other_param_names: What there is by adapter that is not trained.
    """

    structure: Any
    site: Site
    configs: dict[str, MethodConfig]
    probes: dict[str, Probe]
    other_param_names: tuple[str, ...]
    # Of what an update is made of.
    _tensor_names: tuple[str, ...]

    if TYPE_CHECKING:
        # What nn.Module keeps in its dictionaries.
        def __getattr__(self, name: str) -> Any: ...

    @property
    def adapters(self) -> nn.ModuleDict:
        """Something for each adapter: what holds the first of its parameters."""
        held: Any = self._modules[self.structure.names[0]]
        first: nn.ModuleDict = held
        return first

    def rank(self, adapter_name: str) -> int:
        """The rank, as the parameters' sizes tell it; in the capacity form their rows that count."""
        return int(self.structure.rank_of(_Sized(self, adapter_name)))

    def acting_rank(self, adapter_name: str) -> int:
        """The rank of what acts: without components that a method has masked."""
        if self.has_room(adapter_name) and not self.structure.masks:
            # Its size tells, also where this process has but a part of the numbers.
            return self.rank(adapter_name)
        acting = self.structure.acting(self.present(adapter_name))
        return int(self.structure.rank_of(acting))

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """The parameters as their training sees them, in the order of ``structure.names``: those of
        :meth:`trained`, or in the capacity form what holds their rows that count."""
        return tuple(map(_seen, self.held_factors(adapter_name)))

    def trained(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """The parameters that an optimizer holds, in the order of ``structure.names``."""
        return tuple(map(_weight, self.held_factors(adapter_name)))

    def has_room(self, adapter_name: str) -> bool:
        """Is it in the capacity form?"""
        return any(one.room is not None for one in self.held_factors(adapter_name))

    def make_room(self, adapter_name: str, rows: int, *, whole_in_graphs: bool = True) -> None:
        """Gives the parameters that grow so many rows from now on: the capacity form.

        Args:
            rows: Along the dimension in which each grows; new ones are 0.
            whole_in_graphs: Are compiled graphs made of all rows, those that are 0 too?
        """
        for name, one in zip(self.structure.names, self.held_factors(adapter_name), strict=True):
            if name in self.structure.growing:
                one.make_room(self.structure.growing[name], rows, whole_in_graphs=whole_in_graphs)

    def held_factors(self, adapter_name: str) -> list[Factor]:
        """What holds the parameters, in the order of ``structure.names``."""
        # A training asks all layers at every event: the lookups of nn.Module would take most of its time.
        held: Any = self._modules
        return [held[factor]._modules[adapter_name] for factor in self.structure.names]

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The parameters by their names, and what belongs to them without being trained; of the capacity form
        the rows that count."""
        held: Any = self._modules
        if self.probes[adapter_name].at_work:
            return dict(zip(self.structure.names, self.factors(adapter_name), strict=True))
        return {
            name: held[name][adapter_name].counted()
            for name in self._tensor_names
            # Of what is kept or frozen, another adapter may have none.
            if adapter_name in held[name]
        }

    def magnitude(self, adapter_name: str) -> dora.Magnitude | None:
        """DoRA's magnitudes; None: the adapter has none."""
        held: Any = self._modules[dora.MAGNITUDE]
        if adapter_name not in held:
            return None
        found: dora.Magnitude = held[adapter_name]
        return found

    def present(self, adapter_name: str) -> dict[str, Tensor]:
        """:meth:`tensors`, with their numbers where accelerate keeps these elsewhere."""
        tensors = self.tensors(adapter_name)
        if next(iter(tensors.values())).is_meta:
            if any(one.is_part() for one in self.held_factors(adapter_name)):
                raise ValueError(
                    f"adapter {adapter_name!r} is sharded over processes, and this one has a part of it: ask "
                    "for its numbers within FullyShardedDataParallel.summon_full_params(model) (FSDP1), or "
                    "save it with a state dict that all processes have gathered, as by torch's "
                    "get_model_state_dict(..., full_state_dict=True) or accelerator.get_state_dict(model)."
                )
            with onloaded(*(getattr(self, name) for name in tensors)):
                tensors = self.tensors(adapter_name)
        return tensors

    def take_sizes(self, adapter_name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives parameters that grow the sizes ``shapes``, values undefined: for loading."""
        factors = dict(zip(self.structure.names, self.held_factors(adapter_name), strict=True))
        for name, dim in self.structure.growing.items():
            rows = shapes[name][dim]
            if factors[name].counted().shape[dim] != rows:
                factors[name].take_rows(dim, rows)
                self.probes[adapter_name].reloaded = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A checkpoint of another rank: the parameters take its shape, whatever loads it.
        for name in list(self.adapters.keys()):
            keys = {factor: f"{prefix}{factor}.{name}" for factor in self.structure.names}
            for key in keys.values():
                # The names of 0.1.0's first adapters, whose factors were parameters themselves.
                if key in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
            found = {factor: state_dict.get(f"{key}.weight") for factor, key in keys.items()}
            shapes = {factor: tuple(t.shape) for factor, t in found.items() if t is not None}
            if len(shapes) == len(keys) and self.structure.may_take(self.site, shapes, self.configs[name]):
                self.take_sizes(name, shapes)
            kept = {of: state_dict.get(f"{prefix}{of}.{name}.weight") for of in self.structure.kept_names}
            if kept and all(tensor is not None for tensor in kept.values()):
                self.configs[name].note_loaded(kept)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _held(self, r: int, config: MethodConfig, shared: dict[str, Factor]) -> dict[str, Factor]:
        """The parameters by name: new ones, or those that the adapter's layers share."""
        if shared:
            tensors = {name: held.weight for name, held in shared.items()}
            self.structure.check_shared(self.site, r, config, tensors)
            return shared
        held = {name: Factor(tensor) for name, tensor in self.structure.draw(self.site, r, config).items()}
        if self.structure.shared:
            shared.update(held)
        return held

    def _beside(self, name: str) -> nn.ModuleDict:
        """What holds, by adapter, the tensors of this name, which are not trained."""
        if name not in self.other_param_names:
            setattr(self, name, nn.ModuleDict({}))
            self.other_param_names = (*self.other_param_names, name)
            self._tensor_names = (*self._tensor_names, name)
        held: nn.ModuleDict = getattr(self, name)
        return held


class _Sized(dict[str, Tensor]):
    """The parameters of an adapter by name, of the sizes that count.

    Each is looked up when it is asked for: a training asks all layers for their ranks at every event, and one
    parameter tells a rank.
    """

    def __init__(self, layer: AdapterTensors, adapter: str) -> None:
        self._layer, self._adapter = layer, adapter

    def __missing__(self, name: str) -> Tensor:
        held: Any = self._layer._modules[name]
        factor: Factor = held._modules[self._adapter]
        if factor.room is not None and not self._layer.probes[self._adapter].at_work:
            return factor.outline()
        return _seen(factor)


def _seen(held: Factor) -> nn.Parameter:
    # As its training sees it.
    return _weight(held) if (work := held.work) is None else work


def _weight(held: Factor) -> nn.Parameter:
    # By torch.nn.utils.parametrize, or where a model is sharded, it is no parameter of its own.
    weight = held._parameters.get("weight")
    return held.weight if weight is None else weight
