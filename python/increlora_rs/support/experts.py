"""Mixtures of experts: which parameters hold experts and routers, and what one expert's layers are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .warning import warn

try:
    from peft.utils import transformers_weight_conversion as _peft
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
except ImportError:  # Both are internals of their libraries; without them no reader renames either.
    _peft = None

_ADAPTABLE = (
    nn.Linear,
    nn.Embedding,
    nn.modules.conv._ConvNd,
    Conv1D,
    BaseTunerLayer,
    AuxiliaryTrainingWrapper,
)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts")
# What those that are known are called, and what lies beside experts in mixtures only.
_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_BESIDE_EXPERTS = re.compile(r"(^|\.)(shared?_experts?|shared_mlp|experts)(\.|$)")
_MAPS_AN_EXPERT = re.compile(r"experts\.\*\.(?:[^.]+\.)*?(?P<name>[^.]+)(?:\.weight)?\$?$")


@dataclass(frozen=True)
class Parameter:
    """A parameter that experts or routers hold.

    Args:
        module: Full name of the module that holds it.
        name: Its name in there.
        expert: Does it hold experts, and not a router?
    """

    module: str
    name: str
    expert: bool

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.name}"


def fused_parameters(model: nn.Module) -> list[Parameter]:
    """The parameters of ``model`` that hold several experts at once, and those of routers beside them, in
    model order; none of a dense model."""
    modules = dict(_other_modules(model))
    experts: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for path, module in modules.items():
        own = dict(module.named_parameters(recurse=False))
        held = [name for name, tensor in own.items() if _holds_experts(path, module, tensor)]
        if held:
            experts[path], names[path] = int(own[held[0]].shape[0]), held
    found = []
    for path, module in modules.items():
        if path in experts:
            found += [Parameter(path, name, expert=True) for name in names[path]]
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if any(_routes(path, tensor, beside, count) for beside, count in experts.items()):
                found.append(Parameter(path, name, expert=False))
    return found


def _other_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that no adapter is on and that no kind of adapted layer fits."""
    if isinstance(module, _ADAPTABLE) and not is_router(module):
        return
    yield path, module
    for name, child in module.named_children():
        # What holds adapted parameters stands around their module, and is none of the model's.
        inner = path if name == "base_layer" else f"{path}.{name}" if path else name
        yield from _other_modules(child, inner)


def is_router(module: nn.Module) -> bool:
    """Is it a router that is a linear layer by its class alone, and gives out a choice, not a product?"""
    linear = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return linear and re.search("router|gating", type(module).__name__.lower()) is not None


def _holds_experts(path: str, module: nn.Module, tensor: Tensor) -> bool:
    if tensor.dim() < 3:
        return False
    counts = [getattr(module, name, None) for name in _COUNTS]
    named = re.search(r"(^|\.)experts?(\.|$)", path) or "expert" in type(module).__name__.lower()
    return bool(named) or tensor.shape[0] in counts


def _routes(path: str, tensor: Tensor, experts: str, count: int) -> bool:
    """Is it the matrix of a router to the ``count`` experts of module ``experts``?"""
    parent = experts.rpartition(".")[0]
    near = path == parent or path.startswith(f"{parent}." if parent else "")
    return near and tensor.dim() == 2 and count in tensor.shape and min(tensor.shape) > 1


def expert_layers(model: nn.Module) -> dict[str, str]:
    """Names of the layers that make up one expert where it is not fused, as checkpoints and the readers of
    LoRA adapters call them, with the fused parameter of each; empty where no reader renames anything.

    A reader takes *every* target of such a name for one of the experts, those of dense layers too.
    """
    return _layers_of(types_of(model))


def types_of(model: nn.Module) -> set[str]:
    """Types and classes of a model and the models in it, as Transformers calls them."""
    types = set()
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str):
            types |= {kind, type(module).__name__}
    return types


def expert_layers_of_base(name_or_path: str | None) -> dict[str, str] | None:
    """:func:`expert_layers` of a base model by its configuration, if that lies on this machine; else None."""
    types = types_of_base(name_or_path)
    return None if types is None else _layers_of(types)


def types_of_base(name_or_path: str | None) -> set[str] | None:
    """:func:`types_of` of a base model by its configuration, if that lies on this machine; else None."""
    if not name_or_path:
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    types = {part.get("model_type") for part in parts} | set(config.get("architectures") or ())
    return {kind for kind in types if isinstance(kind, str)} if config else None


def _layers_of(types: Iterable[str]) -> dict[str, str]:
    layers: dict[str, str] = {}
    if _peft is None:
        return layers
    for kind in sorted(types):
        for source, target in _checkpoint_names(kind):
            match = _MAPS_AN_EXPERT.search(source)
            if match:
                layers[match["name"]] = target.rpartition(".")[2]
        table = getattr(_peft, "_MODEL_TO_CONVERSION_PATTERN", {})
        layers |= getattr(_peft, "_MOE_TARGET_MODULE_MAPPING", {}).get(table.get(kind), {})
    # PEFT renames routers where it renames experts, so far for some architectures only.
    return layers | {"gate": "gate.weight"} if layers else layers


def checkpoint_conversions(kind: str) -> list[Any]:
    """How Transformers makes a model of type or class ``kind`` of its checkpoints, step by step."""
    return [] if _peft is None else list(get_checkpoint_conversion_mapping(kind) or ())


def _checkpoint_names(kind: str) -> Iterator[tuple[str, str]]:
    for entry in checkpoint_conversions(kind):
        for source in _tuple(getattr(entry, "source_patterns", ())):
            for target in _tuple(getattr(entry, "target_patterns", ()))[:1]:
                yield source, target


def _tuple(patterns: Any) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def expert_names_of(config: Any, modules: list[str]) -> list[str]:
    """The names of :func:`expert_layers` for the base model of an adapter on ``modules``: those kept in
    ``config`` or, where an earlier version saved it, those of the base if that lies on this machine; else a
    warning where names are such."""
    if config.expert_names is not None:
        return list(config.expert_names)
    of_base = expert_layers_of_base(config.base_model_name_or_path)
    if of_base is not None:
        return sorted(of_base)
    doubtful = sorted({name.rpartition(".")[2] for name in modules} & _NAMES)
    if doubtful and not any(_BESIDE_EXPERTS.search(name) for name in modules):
        warn(
            "model_or_adapter_dir: the adapter does not say what its base model is, and modules called "
            f"{doubtful} are read as fused experts where that is a mixture of experts; if so, export the "
            "model in memory instead."
        )
        return []
    return doubtful


def left_out(model: nn.Module, config: Any) -> list[Parameter]:
    """The parameters of experts and routers that ``target_modules`` of ``config`` means, by "all-linear" or
    by a name of theirs, and that are neither excluded nor trained as a whole."""
    targets = config.target_modules
    if targets is None:
        return []
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    layers = expert_layers(model)
    return [
        parameter
        for parameter in fused_parameters(model)
        if all(_matches(config, ".*", key) for key in (parameter.module, parameter.full_name))
        and (every or any(_matches(config, targets, key) for key in _keys(parameter, layers)))
    ]


def names_one_of(parameters: list[Parameter], target: str, model: nn.Module) -> bool:
    """Is ``target``, one of a list of ``target_modules``, the name of one of the parameters?"""
    layers = expert_layers(model) if parameters else {}
    keys = (key for parameter in parameters for key in _keys(parameter, layers))
    return any(key == target or key.endswith(f".{target}") for key in keys)


def _keys(parameter: Parameter, layers: dict[str, str]) -> Iterator[str]:
    """What the parameter is called, and what it was before the experts were fused."""
    yield parameter.full_name
    for old, new in layers.items() if parameter.expert else ():
        if new == parameter.name:
            yield from (f"{parameter.module}.0.{old}", f"{parameter.module}.{old}")


def _matches(config: Any, targets: Any, key: str) -> bool:
    asked = SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=None if isinstance(targets, str) else config.layers_to_transform,
        layers_pattern=None if isinstance(targets, str) else config.layers_pattern,
    )
    return bool(check_target_module_exists(asked, key))


def warn_of_left_out(parameters: list[Parameter], adapts_parameters: bool) -> None:
    """Names parameters of experts and routers that are not adapted, and the way out.

    Args:
        adapts_parameters: Does the method take ``target_parameters``?
    """
    # Two parts of a name: PEFT takes "experts" in modules_to_save for "shared_experts" too.
    modules = sorted({".".join(parameter.module.split(".")[-2:]) for parameter in parameters})
    names = sorted({f"{'.'.join(one.module.split('.')[-2:])}.{one.name}" for one in parameters})
    adapts = f"target_parameters={names}" if adapts_parameters else "IncreLoraConfig(target_parameters=...)"
    warn(
        "target_modules: experts and routers that are parameters, not linear layers, are not adapted and "
        f"stay as they are: {', '.join(_collapsed(parameters))}. {adapts} adapts them, modules_to_save="
        f"{modules} trains them, exclude_modules={modules} ends this warning."
    )


def _collapsed(parameters: list[Parameter]) -> list[str]:
    """Their names, with "*" for the layer's number where several differ in nothing else."""
    groups: dict[str, list[str]] = {}
    for parameter in parameters:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", parameter.full_name), []).append(parameter.full_name)
    return [
        names[0] if len(names) == 1 else f"{name} ({len(names)} layers)" for name, names in groups.items()
    ]
