"""An adapter's tensors in a model's ``state_dict``, as they are saved and loaded: of any rank."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..layers import AdaptedLayer
from ..layers.dora import MAGNITUDE
from ..layers.found import adapted_layers
from ..resizing.cut import is_cut, reshard
from ..support.names import as_saved, short
from .magnitudes import check_magnitude, magnitude_key, magnitude_to_save, saved_magnitude_key

#: Is ``ignore_mismatched_sizes=True`` the wish of the load that runs? PEFT does not pass it on.
ignores_mismatched_sizes: ContextVar[bool] = ContextVar("ignores_mismatched_sizes", default=False)

_CUT = (
    "adapter {name!r} is sharded by fully_shard (FSDP2), and this process has a part of it. Call state = "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)) in all processes, and in the first one "
    "save_pretrained(folder, state_dict=state)."
)


def factor_keys(name: str, adapter_name: str, layer: AdaptedLayer) -> dict[str, str]:
    """The keys of what is saved of module ``name`` in a model's ``state_dict``, by the tensors' names."""
    saved = layer.structure.saved_names(layer.configs[adapter_name])
    name = as_saved(name)
    return {factor: f"{name}.{factor}.{adapter_name}.weight" for factor in saved}


def refuse_cut(model: nn.Module, adapter_names: list[str]) -> None:
    """Raises ValueError where ``fully_shard`` (FSDP2) has cut the parameters of an adapter: to gather them
    all processes are needed, and it is not known whether all save."""
    reshard(model)
    for name in adapter_names:
        for layer in adapted_layers(model, name).values():
            if any(is_cut(factor.weight) for factor in layer.held_factors(name)):
                raise ValueError(_CUT.format(name=name))


def fill_in_heads(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """FSDP1 gives the state dict to the first process alone where it is told to (``rank0_only``), as
    accelerate does, and PEFT asks for a head's in all: the others get what is there, which nobody saves."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            start = f"{as_saved(name)}.modules_to_save.{adapter_name}"
            for key, value in module.modules_to_save[adapter_name].named_parameters():
                if getattr(value, "_fsdp_flattened", False):
                    state_dict.setdefault(f"{start}.{as_saved(key)}", value)


def select(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    selected: dict[str, Tensor],
) -> dict[str, int]:
    """Puts the adapter's tensors into what PEFT has ``selected`` of ``state_dict``: active components only,
    in the form that is saved.

    Returns:
        The rank of each module, by its full name.
    """
    ranks: dict[str, int] = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        keys = factor_keys(name, adapter_name, layer)
        # PEFT looks for those of a module in a checkpoint_wrapper by another name.
        selected.update({key: state_dict[key] for key in keys.values() if key in state_dict})
        if ranks and layer.structure.shared:
            # They stand with the first module.
            for key in keys.values():
                selected.pop(key, None)
        if config.use_dora:
            key = magnitude_key(name, adapter_name)
            if key in state_dict:
                selected.pop(key, None)
                saved = magnitude_to_save(short(name), layer, adapter_name, state_dict[key])
                selected[saved_magnitude_key(name, adapter_name)] = saved
        ranks[short(name)] = layer.rank(adapter_name)
        # A state_dict that was handed over may hold a part of the modules.
        if all(key in selected for key in keys.values()):
            factors = {factor: selected[key] for factor, key in keys.items()}
            if any(map(is_cut, factors.values())):
                raise ValueError(_CUT.format(name=adapter_name))
            if next(iter(factors.values())).is_meta:
                present = layer.present(adapter_name)
                factors = {factor: present[factor].detach() for factor in keys}
            held = dict(zip(layer.structure.names, layer.held_factors(adapter_name), strict=True))
            factors = {f: held[f].to_save(t) if f in held else t for f, t in factors.items()}
            factors = layer.structure.to_save(short(name), factors)
            selected.update({keys[factor]: tensor for factor, tensor in factors.items()})
            ranks[short(name)] = int(layer.structure.rank_of(factors))
    return ranks


def take(model: nn.Module, config: Any, adapter_name: str, mapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the layers of an adapter the ranks of a saved one, whose tensors PEFT has ``mapped`` to keys.

    Returns:
        What each module takes, by the model's own keys.

    Raises:
        ValueError: the tensors are not those of this model's adapter, or are not finite.
    """
    layers = adapted_layers(model, adapter_name)
    own = {name: factor_keys(name, adapter_name, layer) for name, layer in layers.items()}
    # A model that names its modules in another order has another first one.
    first = next((keys for keys in own.values() if mapped.keys() >= set(keys.values())), {})
    first = first or next(iter(own.values()), {})
    expected: set[str] = set()
    filled: dict[str, Tensor] = {}
    shapes: list[tuple[AdaptedLayer, dict[str, tuple[int, ...]]]] = []
    for name, layer in layers.items():
        structure = layer.structure
        keys = first if structure.shared else own[name]
        expected.update(keys.values())
        missing = [key for key in keys.values() if key not in mapped]
        if missing:
            raise ValueError(
                f"the adapter has no tensor {missing[0]!r} for the adapted module {short(name)!r}; "
                "it was saved from another base model, or with another configuration."
            )
        if config.use_dora:
            key = magnitude_key(name, adapter_name)
            expected.add(key)
            check_magnitude(short(name), layer, mapped.get(key), key)
        factors = {factor: mapped[key] for factor, key in keys.items()}
        filled.update({own[name][factor]: tensor for factor, tensor in factors.items()})
        # PEFT leaves out, with a warning, what does not fit.
        loose = ignores_mismatched_sizes.get()
        site = config.site_of(short(name), factors) if loose else layer.site
        rank = None if structure.growing or loose else layer.rank(adapter_name)
        structure.check(short(name), factors, site, config, rank)
        shapes.append((layer, {factor: tuple(tensor.shape) for factor, tensor in factors.items()}))
    names = (*config.method.structure.names, *config.method.structure.kept_names, MAGNITUDE)
    factor = re.compile(rf"\.({'|'.join(names)})(\.|$)")
    # Another method's have others beside those that are called alike.
    extra = sorted(
        key
        for key in mapped
        if (factor.search(key) or key.partition(".lora_")[0] in own) and key not in expected
    )
    if extra:
        raise ValueError(
            f"the adapter has {len(extra)} tensors, {extra[0]!r} the first, that belong to no "
            "adapted module of this model; it was saved from another base model, or with another "
            "configuration."
        )
    # Only now that all is right: an adapter that the load was to replace must survive a refusal.
    for layer, sizes in shapes:
        layer.take_sizes(adapter_name, sizes)
    return filled
