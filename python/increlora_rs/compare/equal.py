"""Methods of one size: the rank with which each trains as many numbers as LoRA does on the same modules."""

from __future__ import annotations

import bisect
import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..contract.config import MethodConfig
from ..support.names import short
from ..support.sites import OUTSIDE, Kind, Site, places
from .base_model import BaseModel
from .methods import Method, Setting
from .tasks import Task

_ADAPTER = "default"


@dataclass(frozen=True)
class Adapted:
    """What is adapted.

    Args:
        sites: The modules, in model order.
        model: The base model's configuration.
    """

    sites: list[Site]
    model: Any

    @property
    def of_rank_1(self) -> int:
        """The numbers that LoRA of rank 1 trains there, without those of the classifier."""
        return sum(site.out + site.features for site in self.sites)


def lora_of_rank_1(base: BaseModel, task: Task, targets: Any) -> PeftModel:
    """The model with a LoRA under ``target_modules``."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=1, target_modules=targets)
    model: PeftModel = get_peft_model(base.classifier(task, 0), config)
    return model


def adapted_in(model: PeftModel) -> Adapted:
    """The modules that LoRA has adapted."""
    sites = [_site(short(name), m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    return Adapted(sites, model.get_base_model().config)


def _site(name: str, layer: Any) -> Site:
    base = layer.get_base_layer()
    if _ADAPTER in layer.lora_embedding_A:
        return Site(name, "embedding", base.embedding_dim, base.num_embeddings, base.padding_idx)
    kind: Kind = tuple(base.kernel_size) if isinstance(base, nn.modules.conv._ConvNd) else "linear"
    features, out = (factor[_ADAPTER].weight.numel() for factor in (layer.lora_A, layer.lora_B))
    return Site(name, kind, out, features)


@dataclass(frozen=True)
class Size:
    """How large a method is.

    Args:
        options: What gives it that size, by name: its rank among them; none of a method of PEFT.
        numbers: Those that it trains, without those of the classifier: at the end of the training where
            ranks change until they have a budget, else from its start.
        of_lora: Those of LoRA.
        ends: Are they those at the end?
    """

    options: dict[str, Any]
    numbers: int
    of_lora: int
    ends: bool

    def __str__(self) -> str:
        rank = f"r={self.options['r']}, " if "r" in self.options else ""
        return f"{rank}{self.numbers:,} parameters, {beside(self.numbers, self.of_lora)} beside LoRA's"

    def measured(self, parameters: dict[str, int]) -> dict[str, int]:
        """The size that a training had, by the parameters that were left and trained, and LoRA's."""
        return {"own": parameters["adapter" if self.ends else "held"], "lora": self.of_lora}


def beside(numbers: float, of_lora: float) -> str:
    """``+0.1 %``: how much more or less than LoRA's."""
    return f"{100 * (numbers / of_lora - 1):+.1f} %"


def size_like_lora(method: Method, setting: Setting, adapted: Adapted) -> Size:
    """The size next to that of LoRA of rank ``setting.r``; of two the smaller.

    Args:
        method: The method; options of its own that set its size are left as they are.
        setting: Of any training on the modules.
        adapted: The modules.

    Raises:
        ValueError: the method cannot adapt them.
    """
    of_lora = round(setting.r * adapted.of_rank_1)

    def size(r: int, choice: int) -> Size:
        options = method.sized(r)[choice]
        config = method.prepare(replace(setting, sized=options)).config
        ends = isinstance(config, AdaLoraConfig) or (isinstance(config, MethodConfig) and config.ends_at_r)
        return Size(options, _count(config, adapted), of_lora, ends)

    try:
        found = size(1, 0)
    except ValueError as error:
        raise ValueError(f"--methods {method}: {error}{_way_out(method, setting, adapted)}") from error
    if "r" not in found.options:
        return found
    for choice in range(len(method.sized(1))):
        found, is_enough = _nearest(functools.partial(size, choice=choice))
        if is_enough:
            break
    return found


def _nearest(size: Callable[[int], Size]) -> tuple[Size, bool]:
    """The size next to LoRA's, which rises with the rank, up to one that the method does not take; and
    whether there is one as large as LoRA or larger."""

    @functools.cache
    def at(r: int) -> Size | None:
        try:
            return size(r)
        except ValueError:
            return None

    def is_enough(r: int) -> bool:
        found = at(r)
        return found is None or found.numbers >= found.of_lora

    high = 1
    while not is_enough(high):
        high *= 2
    first = 1 + bisect.bisect_left(range(1, high + 1), True, key=is_enough)
    around = [at(r) for r in (first - 1, first) if r >= 1]
    nearest = min(
        (found for found in around if found is not None),
        key=lambda found: abs(found.numbers - found.of_lora),
    )
    return nearest, around[-1] is not None


def _count(config: PeftConfig, adapted: Adapted) -> int:
    """The numbers that a configuration trains on the modules.

    Raises:
        ValueError: its method cannot adapt them.
    """
    if isinstance(config, AdaLoraConfig):
        return int(config.target_r * sum(site.out + site.features + 1 for site in adapted.sites))
    if isinstance(config, MethodConfig):
        return _count_ours(copy.deepcopy(config), adapted.sites, adapted.model)
    return int(config.r * adapted.of_rank_1)


def _count_ours(config: MethodConfig, sites: Sequence[Site], model: Any) -> int:
    config.prepare([site.name for site in sites], model)
    structure, total = config.method.structure, 0
    shared: dict[str, torch.Tensor] | None = None
    for site in sites:
        try:
            if site.family not in structure.kinds:
                raise ValueError(f"{config.method.title} takes no {site.family}")
            asked = config.r if config.ends_at_r else config.rank_at(site.name)
            rank = config.rank_for(site, asked)
            if shared is not None:
                structure.check_shared(site, rank, config, shared)
                continue
            shapes = structure.shapes(site, rank, config)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
        total += sum(math.prod(shapes[name]) for name in structure.names)
        if structure.shared:
            shared = {name: torch.empty(shapes[name], device="meta") for name in structure.names}
    return total


def _way_out(method: Method, setting: Setting, adapted: Adapted) -> str:
    """What can be done where a method cannot adapt the modules."""
    config = method.prepare(replace(setting, sized=method.sized(1)[0])).config
    kinds: dict[str, list[Site]] = {}
    found = places([site.name for site in adapted.sites])
    for site in adapted.sites:
        layer, kind = found[site.name]
        if layer != OUTSIDE:
            kinds.setdefault(kind, []).append(site)
    fitting: list[str] = []
    if isinstance(config, MethodConfig):
        for kind in kinds:
            tried = {site.name for name in [*fitting, kind] for site in kinds[name]}
            try:
                chosen = [site for site in adapted.sites if site.name in tried]
                _count_ours(copy.deepcopy(config), chosen, adapted.model)
            except ValueError:
                continue
            fitting.append(kind)
    told = f" Give --targets {','.join(fitting)}, which it can adapt, or leave" if fitting else " Leave"
    return f"{told} {method.name} out: name the others in --methods, in place of all."
