"""Makes the methods known to PEFT: their classes, a save that is atomic and leaves a history and a model
card, a load that names the file."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, register_peft_method

try:
    from peft.utils import transformers_weight_conversion
    from transformers.core_model_loading import WeightRenaming
except ImportError:  # Internals of both; without them Transformers renames nothing.
    transformers_weight_conversion = None

from ..contract.config import MethodConfig
from ..methods import METHODS
from ..methods.increlora.config import IncreLoraConfig
from ..reports.card import write_section
from ..saved.history_file import write_history
from ..support.files import check_weights_file, staged
from .model import MethodModel
from .same_adapter import check_same_adapter
from .state import ignores_mismatched_sizes, refuse_cut


class IncreLoraModel(MethodModel):
    """A model with IncreLoRA adapters; made by ``peft.get_peft_model``.

    Args:
        model: The model to adapt.
        config: The configuration, or a dictionary of configurations by adapter name.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the adapter's weights on the meta device, for loading.

    Raises:
        ValueError: a target module is unknown, of an unsupported type, or too small for its rank.
    """


def register() -> None:
    """Registers the methods with PEFT; calling it again does nothing.

    Raises:
        ImportError: PEFT has a method of such a name that is not ours.
    """
    for method in METHODS:
        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(method.peft_type)
        if known is None:
            register_peft_method(
                name=method.name,
                config_cls=method.config,
                model_cls=IncreLoraModel if method.config is IncreLoraConfig else MethodModel,
                prefix=MethodModel.prefix,
            )
        elif known.__module__ != method.config.__module__:
            raise ImportError(
                f"PEFT already has a method {method.peft_type.value} ({known.__module__}.{known.__name__}); "
                "remove one of the two packages."
            )
    if not hasattr(peft.PeftModel.save_pretrained, "_increlora_atomic"):
        peft.PeftModel.save_pretrained = _atomic(peft.PeftModel.save_pretrained)
        peft.PeftModel.load_adapter = _checked(peft.PeftModel.load_adapter)
        peft.PeftModel.create_or_update_model_card = _described(peft.PeftModel.create_or_update_model_card)
        if transformers_weight_conversion is not None:
            transformers_weight_conversion.build_peft_weight_mapping = _with_old_names(
                transformers_weight_conversion.build_peft_weight_mapping
            )


def _atomic(save: Any) -> Any:
    """``PeftModel.save_pretrained`` that, where an adapter of ours is saved, writes beside the
    target first and then replaces file by file: interrupted, it leaves the old adapter whole.

    Weights and configuration need not be replaced together: loading takes ranks from the weights. Only a
    save under a changed alpha, ``r`` or ``scaling`` that is killed between the two would give a mixture.
    """

    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        ours = _adapters(self)
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if kwargs.get("state_dict") is None:
            refuse_cut(self, ours)
        # A process that is not the main one writes nothing, and must not clear the main one's stage.
        if not ours or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            return save(self, save_directory, *args, **kwargs)
        target = Path(save_directory)
        with staged(target) as stage:
            # PEFT completes a model card that is there.
            for card in target.glob("**/README.md"):
                if stage not in card.parents:
                    copy = stage / card.relative_to(target)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(card, copy)
            result = save(self, str(stage), *args, **kwargs)
            saved = given.get("selected_adapters") or ours
            ours = [name for name in ours if name in saved]
            for name in ours:
                write_history(self, name, stage if name == "default" else stage / name)
            write_section(stage / "README.md", self, ours)
            return result

    save_pretrained._increlora_atomic = True  # type: ignore[attr-defined]
    return save_pretrained


def _with_old_names(build: Any) -> Any:
    """``build_peft_weight_mapping``, by which Transformers' own ``load_adapter`` renames what it reads, that
    also knows the names of 0.1.0's first adapters, whose factors were parameters themselves."""

    @functools.wraps(build)
    def build_peft_weight_mapping(
        weight_conversions: Any, adapter_name: str, peft_config: Any = None, **kwargs: Any
    ) -> Any:
        mapping = build(weight_conversions, adapter_name, peft_config=peft_config, **kwargs)
        # Without any, Transformers takes the names as they are.
        if mapping and isinstance(peft_config, MethodConfig):
            names = "|".join(peft_config.method.structure.names)
            old = rf"(\.({names})\.{re.escape(adapter_name)})$"
            mapping = [*mapping, WeightRenaming(old, r"\1.weight")]
        return mapping

    return build_peft_weight_mapping


def _described(write_card: Any) -> Any:
    """``PeftModel.create_or_update_model_card`` that adds the section on the adapter: ``Trainer`` calls it
    by itself, after ``save_pretrained``, on a card that it has written anew."""

    @functools.wraps(write_card)
    def create_or_update_model_card(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = write_card(self, output_dir, *args, **kwargs)
        ours = _adapters(self)
        if ours:
            write_section(Path(output_dir) / "README.md", self, ours)
        return result

    return create_or_update_model_card


def _adapters(model: Any) -> list[str]:
    """Names of the model's adapters of our methods."""
    return [name for name, config in model.peft_config.items() if isinstance(config, MethodConfig)]


def _checked(load: Any) -> Any:
    """``PeftModel.load_adapter`` that names the damaged file, and refuses an adapter of another kind: over
    one that is there, PEFT reads no configuration, so the check of ``from_pretrained`` does not run."""

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        known = self.peft_config.get(adapter_name)
        if isinstance(known, MethodConfig):
            folder = os.path.join(str(model_id), kwargs.get("subfolder") or "")
            check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
            check_same_adapter(known, Path(folder), adapter_name)
        before = ignores_mismatched_sizes.set(bool(kwargs.get("ignore_mismatched_sizes", False)))
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        finally:
            ignores_mismatched_sizes.reset(before)

    return load_adapter
