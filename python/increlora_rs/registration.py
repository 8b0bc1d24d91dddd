"""Makes IncreLoRA a method of PEFT: its member of PeftType, its classes, and a save that is atomic."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, register_peft_method
from peft.utils.peft_types import PeftType

_NAME = "INCRELORA"


def _member() -> PeftType:
    """The member INCRELORA of the closed enumeration PeftType; made once."""
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    type.__setattr__(PeftType, _NAME, member)
    return member


PEFT_TYPE = _member()


def register() -> None:
    """Registers the method with PEFT; calling it again does nothing.

    Raises:
        ImportError: PEFT has a method of this name that is not ours.
    """
    from .config import IncreLoraConfig
    from .model import IncreLoraModel

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)
    if known is None:
        register_peft_method(
            name=_NAME.lower(),
            config_cls=IncreLoraConfig,
            model_cls=IncreLoraModel,
            prefix=IncreLoraModel.prefix,
        )
    elif known.__module__ != IncreLoraConfig.__module__:
        raise ImportError(
            f"PEFT already has a method {_NAME} ({known.__module__}.{known.__name__}); remove one of "
            "the two packages."
        )
    if not hasattr(peft.PeftModel.save_pretrained, "_increlora_atomic"):
        peft.PeftModel.save_pretrained = _atomic(peft.PeftModel.save_pretrained)
        peft.PeftModel.load_adapter = _checked(peft.PeftModel.load_adapter)


def _atomic(save: Any) -> Any:
    """``PeftModel.save_pretrained`` that, where an IncreLoRA adapter is saved, writes beside the
    target first and then replaces file by file: interrupted, it leaves the old adapter whole.

    Weights and configuration need not be replaced together: loading takes ranks from the weights. Only a
    save under a changed alpha, ``r`` or ``scaling`` that is killed between the two would give a mixture.
    """

    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        ours = any(config.peft_type == PEFT_TYPE for config in self.peft_config.values())
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
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
            return save(self, str(stage), *args, **kwargs)

    save_pretrained._increlora_atomic = True  # type: ignore[attr-defined]
    return save_pretrained


def _checked(load: Any) -> Any:
    """``PeftModel.load_adapter`` that names the damaged file; over an adapter that is there, PEFT reads
    no configuration, so the check of ``IncreLoraConfig.from_pretrained`` does not run."""

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        from .config import check_weights_file

        known = self.peft_config.get(adapter_name)
        if known is not None and known.peft_type == PEFT_TYPE:
            folder = os.path.join(str(model_id), kwargs.get("subfolder") or "")
            check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        return load(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


class staged:
    """Context: a folder whose files replace those of ``target`` when the block ends without error."""

    _PREFIX = ".increlora-save-"

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._target.mkdir(parents=True, exist_ok=True)
        for left in self._target.glob(f"{self._PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._stage = Path(tempfile.mkdtemp(prefix=self._PREFIX, dir=self._target))
        return self._stage

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                for file in sorted(path for path in self._stage.rglob("*") if path.is_file()):
                    goal = self._target / file.relative_to(self._stage)
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                    os.replace(file, goal)
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)
