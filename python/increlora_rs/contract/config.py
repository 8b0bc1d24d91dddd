"""``MethodConfig``: LoraConfig as every method takes it, every argument checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..support import arguments
from ..support.budget import Budget
from ..support.files import check_weights_file
from ..support.names import rank_pattern
from ..support.sites import Kind, Site, module_kinds
from .method import Method

# Options of LoraConfig that mean here what they mean there. Every other one raises unless it is left
# at its default, also one that a later PEFT may add.
SUPPORTED = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "trainable_token_indices",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    }
)
# Those of a method whose update is B diag(E) A or B A, which DoRA takes the norm with.
WITH_DORA = SUPPORTED | {"use_dora"}


def changed_options(config: LoraConfig, known: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """LoraConfig's options outside ``known`` that are not at their default: name, value, default."""
    for option in dataclasses.fields(LoraConfig):
        if option.name in known or not option.init:
            continue
        if option.default is not dataclasses.MISSING:
            default = option.default
        elif option.default_factory is not dataclasses.MISSING:
            default = option.default_factory()
        else:
            continue
        value = getattr(config, option.name)
        # PEFT leaves empty sets in the configurations of mixtures of experts.
        unset = value is None or (not default and value in ([], {}, set(), ()))
        if not unset and value != default:
            yield option.name, value, default


@dataclass
class MethodConfig(LoraConfig):
    """What the configurations of all methods share; a method's own is a subclass.

    Args:
        rank_pattern: Rank by module.
        alpha_pattern: ``lora_alpha`` by module.
        module_kinds: Kept by the library, for the export of a saved adapter: "embedding", or the size of
            a convolution's kernel, by full module name.
        expert_names: Kept by the library, for the export: the last parts of module names, such as "up_proj",
            that PEFT takes for layers of fused experts in this base, whatever they are; None: not known.
        unlike_lora: Kept by the library, for the export: full names of the adapted convolutions that PEFT's
            LoRA would compute in another way, for it takes no ``dilation`` and no ``padding_mode``.
        adapted_parameters: Kept by the library, for the export: the parameters of ``target_parameters`` in
            model order, of each its full name and the number of matrices in it, 0 where it is one.
        unfused_layers: Kept by the library, for the export: what those were called before experts were fused,
            each expert a layer, by the parameter's name, with "*" for each number; None: not known.

    The other arguments are LoraConfig's.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not
            supported; the message names it.
        TypeError: an argument has a wrong type.
    """

    #: Set where the method is declared.
    method: ClassVar[Method]
    #: Options of LoraConfig that mean here what they mean there; every other one raises.
    supported: ClassVar[frozenset[str]] = SUPPORTED
    #: Values of ``init_lora_weights``.
    inits: ClassVar[tuple[Any, ...]] = (True, False)
    #: Options on which it depends what the parameters mean: under another value those of the same shapes are
    #: another update.
    meaning: ClassVar[tuple[str, ...]] = ("use_dora",)

    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by module."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "lora_alpha by module."})
    module_kinds: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Kept by the library: modules that are embeddings, or convolutions of a kernel."},
    )
    expert_names: list[str] | None = field(
        default=None,
        metadata={"help": "Kept by the library: names that LoRA's readers take for those of fused experts."},
    )
    unlike_lora: list[str] = field(
        default_factory=list,
        metadata={"help": "Kept by the library: modules that a LoRA would compute in another way."},
    )
    # Pairs: PEFT sorts the keys of dictionaries.
    adapted_parameters: list[list[Any]] = field(
        default_factory=list,
        metadata={"help": "Kept by the library: parameters that are adapted, and their matrices."},
    )
    unfused_layers: dict[str, list[str]] | None = field(
        default=None,
        metadata={"help": "Kept by the library: the layers that experts were before they were fused."},
    )

    def __post_init__(self) -> None:
        self._take_plain_numbers()
        self._refuse_unsupported()
        # Before PEFT's own checks, which answer to the inits that LoraConfig knows.
        arguments.choice("init_lora_weights", self.init_lora_weights, self.inits)
        self._check_modules()
        if self.rank_pattern is None:
            self.rank_pattern = {}
        if self.alpha_pattern is None:
            self.alpha_pattern = {}
        super().__post_init__()
        self.peft_type = self.method.peft_type
        self._check_shared()
        self.check()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Reads the configuration of a saved adapter; see ``peft.PeftConfig.from_pretrained``.

        Raises:
            ValueError: the adapter's weights lie beside it and are damaged.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def check(self) -> None:
        """Checks the method's own arguments; the shared ones are checked before.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names it, the value and the way out.
        """

    @property
    def policy(self) -> Any:
        """What changes between backward pass and optimizer while it trains; None: nothing."""
        return self.method.policy

    @property
    def exports(self) -> bool:
        """Is there a plain LoRA that does the same?"""
        return True

    def check_alpha(self) -> None:
        """Checks ``lora_alpha``.

        Raises:
            ValueError, TypeError: it is no number above 0.
        """
        arguments.number("lora_alpha", self.lora_alpha, above=0.0)

    def check_r(self) -> None:
        """Checks ``r``, which is a rank unless the method says otherwise.

        Raises:
            ValueError, TypeError: it is no integer of 1 or more.
        """
        arguments.integer("r", self.r, at_least=1)

    @classmethod
    def options_beside_r(cls) -> Sequence[dict[str, Any]]:
        """Where an adapter is to have a given size, what is set beside ``r``: of these, from small to large,
        the first with which a rank makes it large enough."""
        return [{}]

    @property
    def ends_at_r(self) -> bool:
        """Do ranks change while it trains, and have ``r`` on average at the end?"""
        return False

    def resolved(self) -> dict[str, Any]:
        """Of the options that may be left at None, what they amount to."""
        return {}

    def prepare(self, modules: Sequence[str], model: Any) -> None:
        """Takes down what depends on all modules that will be adapted, before the first layer is made.

        Args:
            modules: Their full names, in model order.
            model: The base model's configuration; None: it has none.

        Raises:
            ValueError: the method cannot adapt them together.
        """

    @property
    def first_rank(self) -> int:
        """The rank that modules begin with: ``r``."""
        r: int = self.r
        return r

    def rank_at(self, module: str) -> int:
        """The rank of a module at the start, by its full name: ``rank_pattern``'s, else the first one."""
        return self.rank_pattern.get(self.pattern_key(self.rank_pattern, module), self.first_rank)

    def check_rank(self, site: Site, rank: int) -> None:
        """Checks a module's size, and the rank that it begins with. One above min(in, out) says nothing more,
        but is taken wherever it stays as it is, as LoRA takes it.

        Raises:
            ValueError: the method cannot adapt it, or not begin there; the message goes on after its name.
        """

    def rank_for(self, site: Site, rank: int) -> int:
        """The rank that a module begins with where ``rank`` is asked for.

        Raises:
            ValueError: as for :meth:`check_rank`.
        """
        self.check_rank(site, rank)
        return rank

    def alpha_of(self, module: str) -> float:
        """``alpha_pattern``'s alpha for a full module name, else ``lora_alpha``."""
        default: float = self.lora_alpha
        return self.alpha_pattern.get(self.pattern_key(self.alpha_pattern, module), default)

    def pattern_key(self, pattern: Mapping[str, Any], module: str) -> str:
        """The key of ``pattern`` that a full module name matches; of an expert also one that its parameter
        matches."""
        key: str = get_pattern_key(pattern.keys(), module)
        parameter, _, number = module.rpartition(".")
        if key in pattern or not number.isdigit() or not self.parameter_targets(parameter):
            return key
        of_all: str = get_pattern_key(pattern.keys(), parameter)
        return of_all

    def parameter_targets(self, name: str) -> set[str]:
        """Those of ``target_parameters`` that mean the parameter of this full name, as PEFT reads them."""
        targets = self.target_parameters or ()
        return {one for one in targets if name == one or name.endswith(f".{one}")}

    def kind_of(self, module: str) -> Kind:
        """What a module, by its full name, is: ``module_kinds``' kind, else "linear"."""
        kind = self.module_kinds.get(module, "linear")
        return tuple(kind) if isinstance(kind, (list, tuple)) else kind

    def scale(self, lora_alpha: float, rank: int) -> float:
        """The scale s_k of a module of ``rank`` active components."""
        return lora_alpha / self.divisor(rank)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by for a module of rank ``rank``."""
        return float(rank) ** 0.5 if self.use_rslora else float(rank)

    @property
    def scale_follows_rank(self) -> bool:
        """Does the scale of a module change with its rank?"""
        return False

    def note(
        self,
        sites: Iterable[Site],
        *,
        unlike_lora: Iterable[str],
        experts: Iterable[str],
        parameters: Mapping[str, int],
        unfused: Mapping[str, list[str]],
    ) -> None:
        """Takes down, for the export of a saved adapter, what is adapted."""
        self.module_kinds = module_kinds({site.name: site.kind for site in sites})
        self.expert_names = sorted(experts)
        self.unlike_lora = sorted(unlike_lora)
        self.adapted_parameters = [list(pair) for pair in parameters.items()]
        self.unfused_layers = dict(unfused)

    def note_ranks(self, ranks: Mapping[str, int]) -> None:
        """Takes down the ranks of the modules, by full name, where they can be others than those that the
        configuration makes."""
        if not self.method.structure.growing:
            return
        pattern = rank_pattern(dict(ranks))
        # What was taken down before has each module's own key, and looking them up is a search through all.
        if list(self.rank_pattern) == list(pattern) or any(
            self.rank_at(name) != rank for name, rank in ranks.items()
        ):
            self.rank_pattern = pattern

    def site_of(self, module: str, parameters: Mapping[str, Tensor]) -> Site:
        """A module as the saved adapter alone tells it."""
        out, features = self.method.structure.sizes(parameters, self, module)
        return Site(module, self.kind_of(module), out, features)

    def note_loaded(self, kept: Mapping[str, Tensor]) -> None:
        """Takes down what it repeats of the tensors that the structure keeps, which are being loaded into a
        module."""

    def budget(self, sizes: Sequence[tuple[int, int]], ranks: Iterable[int]) -> Budget:
        """What the ranks of modules of the sizes (out, in) may take; what they do where no budget is set."""
        return Budget(sum(ranks), [1] * len(sizes), "rank")

    def describe_ranks(self, sizes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> str:
        """The total of the ranks, in words."""
        return f"total {sum(ranks)}"

    def room(self, sizes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> list[int] | None:
        """The most rows that modules of the sizes (out, in), now of these ``ranks``, may come to have in a
        training; None: they keep their sizes."""
        return None

    @property
    def makes_room(self) -> bool:
        """Are parameters to have :meth:`room` from the start (the capacity form)?"""
        return False

    @property
    def uses_reserve(self) -> bool:
        """Are there components that learn before they count?"""
        return False

    def of_sum(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """What a weighted sum of adapters changes of the configuration, so that scales are 1; the ranks are
        those of the sum, by module.

        Raises:
            ValueError: updates of the method cannot be added up to one of the method.
        """
        raise ValueError(
            f"adapters: a weighted sum of {self.method.title} adapters is in general none of the method; "
            "write each by increlora_rs.export_lora, load them as LoRA, and add these up."
        )

    def _register_custom_module(self, mapping: dict[Any, Any]) -> None:
        """LoRA layers of one's own, which the method does not know.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"custom_modules={mapping!r} is not supported by {type(self).__name__}; leave such modules out "
            "of target_modules, or use LoraConfig."
        )

    def _take_plain_numbers(self) -> None:
        """NumPy's numbers become Python's, which the configuration file can hold."""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name, None)
            if isinstance(value, np.generic):
                setattr(self, option.name, value.item())
            elif isinstance(value, dict):
                plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in value.items()}
                setattr(self, option.name, plain)

    def _refuse_unsupported(self) -> None:
        for name, value, default in changed_options(self, self.supported):
            raise ValueError(
                f"{name}={value!r} is not supported by {type(self).__name__}; leave it at {default!r}, or "
                "use LoraConfig."
            )

    def _check_shared(self) -> None:
        self.check_r()
        self.check_alpha()
        arguments.number("lora_dropout", self.lora_dropout, at_least=0.0, below=1.0)
        for key, rank in arguments.pattern("rank_pattern", self.rank_pattern):
            arguments.integer(f"rank_pattern[{key!r}]", rank, at_least=self.method.structure.least_rank)
        for key, alpha in arguments.pattern("alpha_pattern", self.alpha_pattern):
            arguments.number(f"alpha_pattern[{key!r}]", alpha, above=0.0)
        arguments.choice("bias", self.bias, ("none", "all", "lora_only"))
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            arguments.choice(name, getattr(self, name), (True, False))

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                arguments.regex(name, getattr(self, name))
            else:
                arguments.collection(name, getattr(self, name), str, "a string or a list of strings")
        arguments.collection("modules_to_save", self.modules_to_save, str, "a list of strings")
        if not isinstance(self.module_kinds, dict):
            raise TypeError(f"module_kinds={self.module_kinds!r} must be a dictionary; leave it out.")
        for name, kind in self.module_kinds.items():
            kernel = isinstance(kind, (list, tuple)) and all(type(size) is int for size in kind)
            if not isinstance(name, str) or not (kernel or kind == "embedding"):
                raise ValueError(
                    f"module_kinds[{name!r}]={kind!r} must be 'embedding' or the size of a kernel, by module "
                    "name; leave it out: the library keeps it."
                )
        arguments.collection("expert_names", self.expert_names, str, "a list of strings")
        arguments.collection("unlike_lora", self.unlike_lora, str, "a list of strings")
        arguments.collection("target_parameters", self.target_parameters, str, "a list of strings")
        for pair in self.adapted_parameters:
            if [type(part) for part in pair] != [str, int]:
                raise TypeError(
                    f"adapted_parameters={self.adapted_parameters!r} must be a list of names, each with a "
                    "number; leave it out: the library keeps it."
                )
        if not isinstance(self.unfused_layers, (dict, type(None))):
            raise TypeError(f"unfused_layers={self.unfused_layers!r} must be a dictionary; leave it out.")
        for name, layers in (self.unfused_layers or {}).items():
            arguments.collection(f"unfused_layers[{name!r}]", layers, str, "a list of strings")
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
            arguments.collection(
                "trainable_token_indices", indices, int, "a list of token numbers, or of such lists by module"
            )
        if not isinstance(self.layers_to_transform, int):
            arguments.collection(
                "layers_to_transform", self.layers_to_transform, int, "a layer number or a list of them"
            )
