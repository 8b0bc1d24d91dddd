"""PEFT's tuner: puts the layers into a model, and its adapters in and out of files."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.peft_types import PeftType
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contract.config import MethodConfig
from ..layers import AdaptedLayer, TransposedLinear, layer_class, quantization_of
from ..layers.factor import Factor
from ..layers.found import adapted_layers
from ..layers.offload import onloaded
from ..layers.operation import check_operation
from ..layers.parameters import AdaptedMatrix, AdaptedParameters, Matrix
from ..layers.parents import bar_fast_paths, check_parent, open_fast_paths
from ..layers.room import make_room
from ..ops.probe import Probe
from ..support.experts import Parameter, expert_layers, is_router, left_out, warn_of_left_out
from ..support.names import short
from ..support.unfused import unfused_layers
from ..support.warning import warn
from .checks import (
    check_no_lora,
    check_not_split,
    check_not_trained_as_a_whole,
    check_targets,
    leave_out_routers,
)
from .magnitudes import (
    settle_magnitudes,
)
from .parameters import (
    adapted_parameters,
    inject_parameters,
    parameters_of,
    patterns_for_modules,
    set_aside,
)
from .state import fill_in_heads, select, take
from .weighted import WeightedSum, combined_config

_PREFIX = "base_model.model."


# PEFT adds the head of these to the user's ``modules_to_save`` when the adapter is in the model already.
_HEAD_NAMED_LATE = ("TOKEN_CLS", "QUESTION_ANS")


class MethodModel(LoraModel):
    """A model with adapters of one of the methods; made by ``peft.get_peft_model``.

    Args:
        model: The model to adapt.
        config: The configuration, or a dictionary of configurations by adapter name.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the adapter's weights on the meta device, for loading.

    Raises:
        ValueError: a target module is unknown, of an unsupported type, or too small for its rank.
    """

    tuner_layer_cls = AdaptedLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts the adapter into ``model``; see ``peft.LoraModel.inject_adapter``."""
        given = config = self.peft_config[adapter_name]
        for name, other in self.peft_config.items():
            layers = adapted_layers(model, name) if other is given and name != adapter_name else {}
            if layers:
                # A twin of an adapter that is there, as TRL's trainers make one: of its ranks as they are.
                given.note_ranks({short(n): m.rank(name) for n, m in layers.items()})
        if not given.inference_mode:
            # The ranks that an adapter reaches stand in its configuration: the user's own, which may
            # serve for another model, is told of the modules only.
            config = self.peft_config[adapter_name] = copy.deepcopy(given)
        if config.fan_in_fan_out and not any(isinstance(module, Conv1D) for module in model.modules()):
            raise ValueError(
                "fan_in_fan_out=True is for Conv1D of transformers, of which the model has none; leave it "
                "out: it is set by itself where it is needed."
            )
        if config.target_modules is None and config.target_parameters and expert_layers(model):
            # As PEFT has it for LoRA.
            config.target_modules = set()
        if config.method.structure.shared:
            # Its keys name the first module alone.
            kwargs["state_dict"] = None
        with patterns_for_modules(config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._shared.clear()
        given.target_modules = config.target_modules
        if given.task_type in _HEAD_NAMED_LATE:
            given.modules_to_save = given.modules_to_save or []
            config.modules_to_save = given.modules_to_save
        bar_fast_paths(model, AdaptedLayer)
        layers = adapted_layers(model, adapter_name)
        config.fan_in_fan_out = any(isinstance(layer, TransposedLinear) for layer in layers.values())
        parameters = adapted_parameters(model, adapter_name, short)
        config.note(
            [layer.site for layer in layers.values()],
            unlike_lora=[short(name) for name, layer in layers.items() if not layer.is_lora],
            experts=expert_layers(model),
            parameters=parameters,
            unfused=unfused_layers(model, parameters),
        )
        if config.makes_room:
            make_room(model, adapter_name)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        check_no_lora(model)
        self._probe = Probe(peft_config.method.title, peft_config.policy is not None)
        self._shared: dict[str, Factor] = {}
        out = left_out(model, peft_config)
        leave_out_routers(model, peft_config, out)
        if isinstance(peft_config.target_modules, (list, set, tuple)):
            check_targets(model, peft_config.target_modules, out)
        out = [one for one in out if not peft_config.parameter_targets(one.full_name)]
        told: set[Parameter] = self.__dict__.setdefault("_told_left_out", set())
        if set(out) - told and not peft_config.inference_mode:
            warn_of_left_out(out, "target_parameters" in peft_config.supported)
            told.update(out)
        # Before anything is changed: names of none raise.
        parameters_of(model, peft_config)
        peft_config.prepare(self._targets(peft_config, model), getattr(model, "config", None))

    def _targets(self, config: MethodConfig, model: nn.Module) -> list[str]:
        """The names of the modules that PEFT is going to adapt, in model order."""
        config = _maybe_include_all_linear_layers(copy.copy(config), model)
        adapted = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        return [
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(adapted) and self._check_target_module_exists(config, name)
        ]

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        # PEFT looks for LoRA by the name of the method, and what stops LoRA stops this.
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = PeftType.LORA
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def _create_and_replace(
        self,
        lora_config: MethodConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        config = lora_config
        check_not_trained_as_a_whole(config, current_key)
        r, alpha = config.rank_at(current_key), config.alpha_of(current_key)
        try:
            if isinstance(target, AdaptedLayer):
                target.update_layer(
                    adapter_name, r, alpha, config=config, probe=self._probe, shared=self._shared
                )
                return
            if isinstance(parent, AdaptedParameters):
                raise ValueError(
                    "an adapter has its weight in target_parameters already; name it in one of the two, by "
                    "exclude_modules if need be."
                )
            check_parent(parent, target_name, target)
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            check_not_split(base, self.model, current_key)
            if is_router(base):
                raise ValueError(
                    f"a {type(base).__name__} gives out a choice of experts, to which no update can be "
                    "added; name it in exclude_modules, in modules_to_save, or its weight in "
                    "target_parameters."
                )
            quantization = quantization_of(base, **get_quantization_kwargs(self.model))
            if quantization is None:
                check_operation(base)
            module = layer_class(base, quantization)(
                target, adapter_name, config, r, alpha, self._probe, quantization, current_key, self._shared
            )
        except ValueError as error:
            raise ValueError(f"target_modules: {current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Puts the adapter on the parameters that ``target_parameters`` names; PEFT calls it for them."""
        found = parameters_of(model, peft_config)
        frozen = adapter_name not in self.active_adapters

        def make(matrix: Matrix, name: str, r: int, alpha: float) -> AdaptedMatrix:
            made = AdaptedMatrix(
                matrix, adapter_name, peft_config, r, alpha, self._probe, None, name, self._shared
            )
            if frozen:
                made.requires_grad_(False)
            return made

        def update(layer: AdaptedMatrix, r: int, alpha: float) -> None:
            layer.update_layer(adapter_name, r, alpha, config=peft_config, probe=self._probe)

        for one in found:
            check_not_trained_as_a_whole(peft_config, one.full_name)
            check_not_split(one.holder, self.model, one.module)
            self._check_target_module_compatiblity(peft_config, model, one.module.rpartition(".")[2])
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            inject_parameters(model, found, peft_config, make, update)
        set_aside(peft_config, found, map(short, adapted_layers(model, adapter_name)))
        return [one.full_name for one in found]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        settle_magnitudes(adapted_layers(self.model, adapter_name).values(), adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        if isinstance(child, AdaptedParameters):
            setattr(parent, child_name, new_module)
            return
        # It moves the adapter to where the weight is, which an offloaded one is not.
        with onloaded(child) if isinstance(new_module, AdaptedLayer) else nullcontext():
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        open_fast_paths(self.model, AdaptedLayer)
        return unloaded

    def _check_merge_allowed(self) -> None:
        """Gives base layers that share their weight with another module, as tied embeddings do, one of
        their own: what is merged is the update of the layer alone."""
        used = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        for name, holder in self.model.named_modules():
            names = holder.matrices() if isinstance(holder, AdaptedParameters) else ()
            for parameter in names:
                held = holder.base_layer._parameters[parameter]
                if used[id(held)] > 1:
                    holder.base_layer._parameters[parameter] = _own(held, f"{name}.{parameter}")
        for name, layer in self.model.named_modules():
            base: Any = layer.get_base_layer() if isinstance(layer, AdaptedLayer) else None
            weight = getattr(base, "weight", None)
            # In a quantised layer, the new weight is another object.
            if isinstance(weight, nn.Parameter) and used[id(weight)] > 1 and layer.quantization is None:
                base.weight = _own(weight, name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds the weighted sum of adapters as a new adapter, frozen, of scale 1 and with ranks of its own.

        Args:
            adapters: Names of the adapters to add up.
            weights: A number for each, negative ones too.
            adapter_name: Name of the new adapter.
            combination_type: "cat": every component of every adapter, exact. "svd": the nearest sum of
                rank ``svd_rank``. "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd":
                PEFT's ways to thin out the updates before they are added up, then as "svd". One adapter
                alone is scaled, exact, by any of them.
            svd_rank: The most that a module keeps; None: the largest rank that it has among ``adapters``.
            svd_clamp: Not supported, for it would cost the factors their orthonormality.
            svd_full_matrices: Without effect on the sum; there to be called as PEFT's LoRA is.
            svd_driver: As ``svd_full_matrices``.
            density: Part of the values that thinning out keeps, above 0 and at most 1.
            majority_sign_method: "total" or "frequency": how "ties" chooses a sign.

        Raises:
            ValueError: an adapter is unknown or trains more than its update (``modules_to_save``, ``bias``),
                the new name is taken, or an argument is wrong; PEFT's ways that add factor to factor
                ("linear", "ties", ...) are refused, for components of grown adapters do not correspond.
        """
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"adapters: there is no {name!r}; the model has {list(self.peft_config)}.")
            if self.peft_config[name].target_parameters:
                raise ValueError(
                    f"adapters: {name!r} has target_parameters, of which no weighted sum is made; merge the "
                    "adapters, or export them."
                )
            # Of some methods there are no sums at all, whatever the other arguments are.
            self.peft_config[name].of_sum({"": 1})
        if adapter_name in self.peft_config:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken; give another, or delete_adapter it first."
            )
        if svd_clamp is not None:
            raise ValueError(f"svd_clamp={svd_clamp!r} is not supported; leave it out.")
        wish = WeightedSum(adapters, weights, combination_type, svd_rank, density, majority_sign_method)
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, AdaptedLayer) and any(adapter in layer.adapters for adapter in adapters)
        }
        sums = {name: wish.of(layer) for name, layer in layers.items()}
        ranks = {name: int(e.shape[0]) for name, (_, _, e) in sums.items()}
        configs = {name: self.peft_config[name] for name in adapters}
        self.peft_config[adapter_name] = combined_config(configs, ranks)
        trained = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name, factors in sums.items():
            layer = layers[name]
            values = layer.structure.of_low_rank(*factors) or {}
            parameters = dict(zip(layer.structure.names, layer.factors(adapter_name), strict=True))
            for factor, value in values.items():
                parameters[factor].data = value.clone(memory_format=torch.contiguous_format)
        # Injecting an adapter makes the active ones trainable.
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; see ``peft.LoraModel.delete_adapter``.

        Raises:
            ValueError: a scheduler is attached to it, or there is none of this name.
        """
        layers = adapted_layers(self.model, adapter_name).values()
        if any(layer.probes[adapter_name].attached for layer in layers):
            raise ValueError(
                f"adapter_name={adapter_name!r}: a scheduler is attached to this adapter; call its detach() "
                "first."
            )
        super().delete_adapter(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        mixed = kwargs.get("adapter_names") is not None
        if mixed and any(isinstance(module, AdaptedParameters) for module in self.model.modules()):
            raise ValueError(
                "adapter_names: adapters cannot be mixed within a batch where target_parameters are adapted, "
                "for a parameter is one for all rows; call set_adapter(), and the model once for each."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors, active components only; brings ``config.rank_pattern`` up to date."""
        fill_in_heads(model, adapter_name, state_dict)
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        config.note_ranks(select(model, config, adapter_name, state_dict, selected))
        return selected

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is for LoRA that changes the base weights (PiSSA, "
            "OLoRA, CorDA, LoRA-GA), which this method does not; leave it out. The adapter as a plain LoRA "
            "is what increlora_rs.export_lora writes."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Maps a saved adapter to the model's keys, and gives its layers the saved ranks.

        Raises:
            ValueError: the tensors are not those of this model's adapter, or are not finite.
        """
        # Adapters of 0.1.0 name the factors as parameters.
        old = re.compile(rf"\.({'|'.join(config.method.structure.names)})$")
        state_dict = {old.sub(r"\g<0>.weight", key): tensor for key, tensor in state_dict.items()}
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return mapped | take(model, config, adapter_name, mapped)


def _own(weight: Any, name: str) -> nn.Parameter:
    warn(
        f"the weight of {name!r} is tied to another module's, which the adapter leaves alone; to "
        "merge, the module gets a weight of its own"
    )
    return nn.Parameter(weight.detach().clone(), weight.requires_grad)
