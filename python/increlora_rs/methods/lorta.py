"""LoRTA (arXiv 2410.04060): the updates of all attention projections of a model as one tensor of five ways,
of CP rank r: two factors and three small tables, shared by all modules.

For head h of the matrix of kind m in layer l, with ``c = C_h[h] * C_m[m] * C_l[l]``, a block of the update is
``s B^T diag(c) A`` (d / H, d); the blocks of the heads stand below each other, or beside, transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..contract.config import MethodConfig
from ..contract.method import Method
from ..contract.structure import Structure
from ..ops.autocast import without_autocast
from ..ops.update import LowRank
from ..support import arguments
from ..support.sites import Site, in_order, places, within_layer

# Ends of names of the projections that an attention's heads go into, of which the input is theirs.
_AFTER_HEADS = (
    "o_proj",
    "out_proj",
    "out_lin",
    "o",
    "to_out",
    "to_out.0",
    "linear_out",
    "output_proj",
    "post_proj",
)
# Those that others have, too, so that it takes an attention around them: BERT's attention.output.dense.
_AFTER_HEADS_OF_ATTENTION = ("dense", "c_proj", "proj", "projection", "projection_layer", "Wo", "output")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Place(NamedTuple):
    """Where a module stands in the tensor: its layer and its kind of matrix, columns of C_l and C_m, and
    whether heads go in."""

    layer: int
    kind: int
    heads_go_in: bool


@dataclass
class LortaConfig(MethodConfig):
    """Configuration of LoRTA (arXiv 2410.04060), in place of ``peft.LoraConfig``.

    All adapted modules together train ``r (d + d/H + H + L + M)`` numbers: d the model's width, H its heads,
    L the layers and M the kinds of modules that are adapted, such as query, key, value and output. Learning
    rates of about 1e-2 are usual, for a gradient is multiplied by the other four factors.

    Args:
        r: Rank of the tensor, and of every module's update.
        lora_alpha: The scale is ``lora_alpha / r``; with ``use_rslora=True`` over the root of r.
        orientation: Which side of an update is in heads; the other is the model's width. "natural": that
            which heads are in, the output of query, key and value, the input of the attention's output.
            "litgpt": the output everywhere, as the authors' code for instruction tuning has it. "peft": the
            input everywhere, as their code for GLUE has it. Under these two the updates of all modules have
            the same r columns and rows, weighted otherwise in each. All adapted modules need one width, and
            heads of one size.
        heads: H, on which the size of a head depends; None: ``num_attention_heads`` of the base model's
            configuration. In a saved adapter it is a number.
        after_heads: Under "natural", ends of the names of those modules whose input is in heads; None: the
            usual ones, "o_proj", "out_proj", the "dense", "c_proj" or "proj" of what is called an attention,
            and more. In a saved adapter they are named.
        init_scale: Of ``C_h, C_l, C_m``, which are uniform within ``sqrt(6 / ((1 + 5 init_scale^2) r))``; 0
            or more: a larger one makes them smaller. A is uniform within ``1 / sqrt(r)``.
        init_lora_weights: True: B 0. False: B as A, so that a fresh adapter is not the identity (for tests).
        module_names: Kept by the library: full names of the adapted modules, in model order.

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout``, ``bias``, ``use_rslora``,
    ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``alpha_pattern``, ``fan_in_fan_out`` (set by itself where it is needed),
    ``task_type``, ``inference_mode``. ``rank_pattern`` raises, for there is one rank. Linear layers can be
    adapted.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    meaning: ClassVar[tuple[str, ...]] = ("orientation", "heads", "after_heads")

    orientation: Literal["natural", "litgpt", "peft"] = field(
        default="natural", metadata={"help": "Which side of an update is in heads."}
    )
    heads: int | None = field(default=None, metadata={"help": "Number of attention heads."})
    after_heads: list[str] | None = field(
        default=None, metadata={"help": "Ends of names of modules whose input is in heads."}
    )
    init_scale: float = field(default=0.0, metadata={"help": "Larger ones make the tables smaller."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: B starts at 0. False: B random.", "lora_variants": ()}
    )
    module_names: list[str] = field(
        default_factory=list, metadata={"help": "Kept by the library: the adapted modules."}
    )

    def check(self) -> None:
        """Checks the orientation, the heads and the initialisation."""
        if self.rank_pattern:
            raise ValueError(
                f"rank_pattern={self.rank_pattern!r}: all modules are parts of one tensor, which has one "
                "rank; leave it out, and give r."
            )
        arguments.choice("orientation", self.orientation, ("natural", "litgpt", "peft"))
        arguments.integer("heads", self.heads, at_least=1, optional=True)
        arguments.collection("after_heads", self.after_heads, str, "a list of strings")
        if self.after_heads is not None and self.orientation != "natural":
            raise ValueError(
                f"after_heads={self.after_heads!r} goes with orientation='natural', and {self.orientation!r} "
                "treats all modules alike; leave it out."
            )
        arguments.number("init_scale", self.init_scale, at_least=0.0)
        arguments.collection("module_names", self.module_names, str, "a list of strings")
        self._place(self.module_names)

    def prepare(self, modules: Sequence[str], model: Any) -> None:
        """Takes down the modules, and the number of heads.

        Raises:
            ValueError: the adapter is of other modules, or the number of heads is not known.
        """
        known = self.module_names or list(modules)
        if set(modules) != set(known):
            other = next(n for n in [*known, *modules] if (n in known) != (n in modules))
            raise ValueError(
                f"module_names: the adapter is one tensor over {len(known)} modules, but in this "
                f"model {len(modules)} are adapted, and {other!r} belongs to one of the two alone; it was "
                "saved from another base model. For a fresh one, leave module_names out."
            )
        self.heads = self.heads or _heads_of(model)
        # In the order of the model that it was made for, by which kinds have their columns.
        self.module_names = known
        if self.orientation == "natural" and self.after_heads is None:
            # Other releases may know other names, and an adapter stays what it is.
            self.after_heads = sorted({within_layer(name) for name in known if self.heads_go_in(name)})
        self._place(known)

    def check_rank(self, site: Site, rank: int) -> None:
        """Checks the side that is in heads.

        Raises:
            ValueError: it is not a whole number of heads.
        """
        size, heads = self.sides(site)[1], self.heads
        if heads is None or size % heads:
            side = "input" if self.heads_go_in(site.name) else "output"
            raise ValueError(
                f"orientation={self.orientation!r}: its {side} of {size} is not divided by heads={heads}; "
                "leave it out of target_modules, or take another orientation or number of heads."
            )

    def place(self, module: str) -> Place:
        """Where a module stands in the tensor, by its full name."""
        return self._places[module]

    def heads_go_in(self, module: str) -> bool:
        """Is the input of a module in heads, and not its output?"""
        if self.orientation != "natural":
            return self.orientation == "peft"
        if self.after_heads is not None:
            return _ends_with(module, self.after_heads)
        inside = within_layer(module)
        of_attention = _ATTENTION.search(inside.rpartition(".")[0]) is not None
        return _ends_with(inside, _AFTER_HEADS) or (
            of_attention and _ends_with(inside, _AFTER_HEADS_OF_ATTENTION)
        )

    def sides(self, site: Site) -> tuple[int, int]:
        """The size of the side that is the model's width, and of that in heads."""
        return (site.out, site.features) if self.heads_go_in(site.name) else (site.features, site.out)

    def _place(self, modules: Sequence[str]) -> None:
        found = places(modules)
        layers = in_order(layer for layer, _ in found.values())
        kinds = list(dict.fromkeys(kind for _, kind in found.values()))
        self.layer_count, self.kind_count = len(layers), len(kinds)
        self._places = {
            name: Place(layers.index(layer), kinds.index(kind), self.heads_go_in(name))
            for name, (layer, kind) in found.items()
        }


class Tensor5(Structure):
    """A (r, d), B (r, d / H), C_h (r, H), C_l (r, L) and C_m (r, M): of all modules together."""

    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_C_h", "lora_C_l", "lora_C_m")
    shared: ClassVar[bool] = True

    def shapes(self, site: Site, rank: int, config: LortaConfig) -> dict[str, tuple[int, ...]]:
        """Those that a module of this size needs."""
        heads = config.heads or 1
        width, in_heads = config.sides(site)
        columns = (width, in_heads // heads, heads, config.layer_count, config.kind_count)
        return {name: (rank, count) for name, count in zip(self.names, columns, strict=True)}

    def draw(
        self, site: Site, rank: int, config: LortaConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Kaiming uniform over r, which is the last dimension where the authors' code draws; B 0."""
        device = None if generator is None else generator.device
        bound = 1.0 / math.sqrt(rank)
        of_tables = math.sqrt(6.0 / ((1.0 + 5.0 * config.init_scale**2) * rank))
        bounds = (bound, 0.0 if config.init_lora_weights else bound, *[of_tables] * 3)
        shapes = self.shapes(site, rank, config)
        return {
            name: torch.empty(shapes[name], device=device).uniform_(-limit, limit, generator=generator)
            for name, limit in zip(self.names, bounds, strict=True)
        }

    def first_learners(self, site: Site, config: LortaConfig) -> tuple[str, ...]:
        """B, as long as it is 0."""
        return ("lora_B",) if config.init_lora_weights else ()

    def update(
        self, parameters: Mapping[str, Tensor], site: Site, config: LortaConfig, scale: Any, *, training: bool
    ) -> LowRank:
        """A LoRA of rank r: A on the side of the model's width, on the other B times each head's part of C_h,
        and between them the layer's and the kind's."""
        a, b, of_heads, of_layers, of_kinds = (parameters[name] for name in self.names)
        place = config.place(site.name)
        with without_autocast(a.device.type):
            in_heads = (of_heads.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
            e = (of_layers[:, place.layer] * of_kinds[:, place.kind]).unsqueeze(1)
        if place.heads_go_in:
            return LowRank(in_heads, a.t(), e, scale)
        return LowRank(a, in_heads.t(), e, scale)

    def rank_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Rows of A."""
        return parameters["lora_A"].shape[0]

    def sizes(self, parameters: Mapping[str, Tensor], config: LortaConfig, name: str) -> tuple[int, int]:
        """The model's width, and the heads together.

        Raises:
            ValueError: A, B or C_h is no matrix.
        """
        a, b, of_heads = (parameters[factor] for factor in self.names[:3])
        if not a.dim() == b.dim() == of_heads.dim() == 2:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (a, b, of_heads))
            raise ValueError(
                f"model_or_adapter_dir: lora_A, lora_B and lora_C_h have shapes {shapes}; they must be "
                "matrices."
            )
        width, in_heads = int(a.shape[1]), int(b.shape[1] * of_heads.shape[1])
        return (width, in_heads) if config.heads_go_in(name) else (in_heads, width)

    def check_shared(self, site: Site, rank: int, config: LortaConfig, shared: Mapping[str, Tensor]) -> None:
        """As :meth:`Structure.check_shared`; what fits depends on the orientation, too."""
        try:
            super().check_shared(site, rank, config, shared)
        except ValueError as error:
            raise ValueError(
                f"orientation={config.orientation!r}: {error}, or take another orientation."
            ) from error

    def spread(
        self, found: dict[str, dict[str, Tensor]], config: LortaConfig
    ) -> dict[str, dict[str, Tensor]]:
        """The one entry, for each module that the configuration names.

        Raises:
            ValueError: there are several, or the configuration names no modules or no heads.
        """
        if found and (len(found) > 1 or not config.module_names or config.heads is None):
            raise ValueError(
                f"model_or_adapter_dir: the adapter has tensors of {len(found)} modules, and its "
                f"configuration names {len(config.module_names)} that share one set, with heads="
                f"{config.heads}; it is damaged: take the file that save_pretrained wrote."
            )
        return {name: parameters for parameters in found.values() for name in config.module_names}


def _ends_with(module: str, ends: Sequence[str]) -> bool:
    return any(f".{module}".endswith(f".{end}") for end in ends)


def _heads_of(model: Any) -> int:
    """The number of attention heads by a base model's configuration."""
    text = model.get_text_config() if hasattr(model, "get_text_config") else model
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise ValueError(
            f"heads=None: the base model's configuration has num_attention_heads={heads!r}; give LortaConfig("
            "heads=...), the number of attention heads."
        )
    return heads


METHOD = Method(
    name="lorta",
    title="LoRTA",
    config=LortaConfig,
    structure=Tensor5(),
    summary="A LoRA whose matrices are made of five tensors that all modules share",
    paper="https://arxiv.org/abs/2410.04060",
)
