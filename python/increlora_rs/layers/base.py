"""What every adapted layer has, whatever module it adapts and whatever the method: adapters, merging, the
forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..contract.config import MethodConfig
from ..ops.modes import watched
from ..ops.probe import Probe
from ..ops.scales import Ranks, Scales
from ..ops.untouched import asks
from ..ops.update import Call, Update
from ..support.sites import Site
from ..support.warning import warn
from . import dora
from .call import drops_plainly, is_plain_call
from .factor import Constant, Factor, Kept
from .offload import hook_of
from .reentrant import in_pass
from .requantised import Former
from .tensors import AdapterTensors
from .weight import changed_weight


class AdaptedLayer(AdapterTensors, LoraLayer, ABC):
    """A frozen module with an update of its weight, which the method's structure makes of parameters.

    For each adapter the parameters are ``FACTOR.NAME.weight``, FACTOR one of ``structure.names``. They alone
    say what the rank is, and they keep their identity when they grow, so optimizers and hooks that hold them
    stay valid. A subclass says what in and out are, and how the update acts.

    Args:
        base_layer: The module.
        adapter_name: Name of the first adapter; further ones come by :meth:`update_layer`.
        config: Its configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        probe: What the layers of the adapter share with the training.
        quantization: PEFT's access to a quantised weight.
        name: Full name of the module in its model.
        shared: The parameters by name that the adapter's layers share, if they do; the first puts them in.

    Raises:
        ValueError: the module cannot be adapted, or is too small for the rank.
    """

    # What the layer adapts: "linear", "transposed" (transformers' Conv1D), "embedding", "convolution".
    kind: ClassVar[str]
    # The dimension of its output that is (out).
    channel: int = -1
    # May there be steps in which nothing comes to it, as to an expert? They tell nothing of it.
    may_be_idle: bool = False

    in_features: int
    out_features: int
    lora_alpha: dict[str, float]
    scaling: Scales
    use_rslora: dict[str, bool]
    lora_dropout: nn.ModuleDict
    merged_adapters: list[str]

    if TYPE_CHECKING:
        # What nn.Module keeps in its dictionaries, and what LoraLayer inherits.
        def __getattr__(self, name: str) -> Any: ...

    # What a quantised base layer held before adapters were merged into it.
    _former: Former | None = None

    # On each layer: the parameters' names are the method's. All adapters of a model are of one.
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = (
        "lora_alpha",
        "scaling",
        "use_rslora",
        "lora_dropout",
        "configs",
        "probes",
        "slots",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MethodConfig,
        r: int,
        lora_alpha: float,
        probe: Probe,
        quantization: QuantizationBackend | None = None,
        name: str = "",
        shared: dict[str, Factor] | None = None,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.structure = config.method.structure
        self._method = config.method.name
        self.site = self._site(name)
        if self.site.family not in self.structure.kinds:
            raise ValueError(
                f"it is of kind {self.site.family!r}, and {config.method.title} adapts "
                f"{' and '.join(sorted(self.structure.kinds))} modules only; leave it out of "
                "target_modules, or take IncreLoraConfig."
            )
        if self.site.largest_rank == 0:
            raise ValueError(
                f"it has {self.site.features} inputs and {self.site.out} outputs: nothing to adapt; leave it "
                "out of target_modules, by exclude_modules."
            )
        self.quantization = quantization
        self.squares = dora.Squares()
        self.scaling = Scales(self)
        self.adapter_layer_names = (*self.structure.names, dora.MAGNITUDE)
        self._tensor_names = self.structure.names
        for factor in self.structure.names:
            setattr(self, factor, nn.ModuleDict({}))
        self.configs: dict[str, MethodConfig] = {}
        self.probes: dict[str, Probe] = {}
        self.slots: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, probe=probe, shared=shared)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: MethodConfig,
        probe: Probe,
        shared: dict[str, Factor] | None = None,
    ) -> None:
        """Creates, or creates anew, the parameters of an adapter of rank ``r``, or takes ``shared`` ones."""
        r = config.rank_for(self.site, r)
        self.lora_alpha[adapter_name] = lora_alpha
        self.configs[adapter_name] = config
        self.probes[adapter_name] = probe
        self.slots[adapter_name] = probe.new_slot()
        self.use_rslora[adapter_name] = config.use_rslora
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        for factor, held in self._held(r, config, {} if shared is None else shared).items():
            getattr(self, factor)[adapter_name] = held
        for name, value in self.structure.kept(self.site, r, config).items():
            self._beside(name)[adapter_name] = Kept(value)
        for name, value in self.structure.frozen(self.site, config).items():
            self._beside(name)[adapter_name] = Constant(value)
        self.scaling.configure(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = dora.new_magnitude(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        hook = None if device is not None else hook_of(self.get_base_layer())
        if hook is not None:
            # The base's weight is on meta between calls, where an adapter would lose its numbers.
            device = hook.execution_device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _site(self, name: str) -> Site:
        return Site(name, "linear", self.out_features, self.in_features)

    @property
    def largest_rank(self) -> int:
        """min(in, out): no update of this layer has a higher rank."""
        return self.site.largest_rank

    @property
    def is_lora(self) -> bool:
        """Would PEFT's LoRA layer give the same output with the same matrices?"""
        return True

    @property
    def r(self) -> Mapping[str, int]:
        """The rank by adapter name, read off the parameters."""
        return Ranks(self)

    @r.setter
    def r(self, ranks: dict[str, int]) -> None:
        # LoraLayer's constructor begins with an empty dictionary.
        if ranks:
            raise AttributeError(
                f"r={ranks!r}: a rank is the size of the parameters, which training and loading change."
            )

    def update(self, adapter_name: str) -> Update:
        """The update outside of training."""
        tensors = self.present(adapter_name)
        config, scale = self.configs[adapter_name], self.scaling[adapter_name]
        return self.structure.update(tensors, self.site, config, scale, training=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the shape of the base weight, in the dtype of the parameters; of DoRA that of the
        direction, before the norm and the magnitude."""
        return self._as_weight(self.update(adapter).dense()).to(self.factors(adapter)[0].dtype)

    def _as_weight(self, delta: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the base weight."""
        return delta

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix (out, in)."""
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters (None: the active ones) to the base weight.

        A quantised weight is dequantised and quantised anew, with a warning, where its library can.

        Raises:
            ValueError: the base weight cannot be changed, or, with ``safe_merge``, the result is not
                finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.adapters:
                former = self._changed_weight(name, safe=safe_merge)
                # That of the first that changed it.
                if self._former is None:
                    self._former = former
                self.merged_adapters.append(name)

    def _changed_weight(self, name: str, sign: int = 1, *, safe: bool = False) -> Former | None:
        """Adds the update of an adapter to the base weight, or takes it off; without any component, or
        magnitude, there is none."""
        held = self.magnitude(name)
        if held is not None:
            change = dora.change_of_merge if sign > 0 else dora.change_of_unmerge
            delta = self._as_weight(change(self, held, name))
        elif self.rank(name) == 0:
            return None
        else:
            delta = self.get_delta_weight(name)
            delta = delta if sign > 0 else -delta
        self.squares.forget()
        return changed_weight(self, self.quantization, delta, name, check_finite=safe)

    def unmerge(self) -> None:
        """Takes all merged updates out of the base weight again.

        A quantised weight is put back as it was; the merged layer keeps it for that.
        """
        if not self.merged:
            warn("no adapter is merged, so there is nothing to unmerge")
        former, self._former = self._former, None
        if former is not None and former.put_back(self.get_base_layer()):
            self.merged_adapters.clear()
            self.squares.forget()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.adapters:
                self._changed_weight(name, -1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus the active adapters' updates."""
        if not args and not kwargs and self._is_bare():
            return self._of_base(x)
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.base_layer
        if self.disable_adapters or self.merged:
            return base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(base(x, *args, **kwargs), x, adapter_names)
        names = [name for name in self.active_adapters if name in self.adapters]
        unwatched = not watched()
        # Nobody else sees what comes out, which is fresh memory then.
        fresh = unwatched and is_plain_call(base)
        fusable = names and fresh and not args and not kwargs and drops_plainly(self.lora_dropout[names[0]])
        result = self._fused(x, names[0]) if fusable else None
        if result is None:
            result = self._of_base(x, *args, **kwargs)
        else:
            result = self._in_magnitude(result, names[0], inplace=True)
            names = names[1:]
        for name in names:
            before, result = result, self._updated(result, x, name, inplace=fresh)
            # An update without components gives back what it is given.
            fresh = unwatched and (fresh or result is not before)
        return result

    def _is_bare(self) -> bool:
        """Has no active adapter anything here, and is nobody asking for what it would get? Then the layer is
        its base layer, and takes no time of its own to speak of. False, too, where a graph is made, which has
        to do for any number of components."""
        structure = self.structure
        if structure.least_rank or self._disable_adapters or self.merged_adapters:
            return False
        if torch.compiler.is_compiling():
            return False
        # What nn.Module.__getattr__ would look for, where it lies.
        modules: Any = self._modules
        held, dropouts = modules[structure.names[0]]._modules, modules["lora_dropout"]._modules
        magnitudes = modules[dora.MAGNITUDE]._modules
        for name in self.active_adapters:
            if name not in held:
                continue
            if name in magnitudes:
                return False
            parameters = held[name]._parameters
            if "weight" not in parameters:
                return False
            # Taken by its name, for so DeepSpeed's ZeRO 3 notices that its numbers are needed.
            if parameters["weight"].numel() or asks(self.probes[name]):
                return False
            if not drops_plainly(dropouts[name]):
                return False
        return True

    def _of_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.training and x.requires_grad and not result.requires_grad and torch.is_grad_enabled():
            raise ValueError(self._no_gradient())
        return result

    def _no_gradient(self) -> str:
        base = self.get_base_layer()
        what = type(getattr(base, "weight", base)).__name__
        return (
            f"the base layer {type(base).__name__} ({what}) passes no gradient on to its input, so modules "
            "before it would not learn; quantise it in another way, weights only, to train."
        )

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        """The output of a plain base layer and its update by one operation; None where there is none."""
        return None

    def _updated(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        """``y``, which may be overwritten where ``inplace``, as adapter ``name`` has it for x."""
        result = self._added(y, x, name, inplace=inplace)
        return self._in_magnitude(result, name, inplace=inplace or result is not y)

    def _in_magnitude(self, y: Tensor, name: str, *, inplace: bool) -> Tensor:
        """``y``, in which is the update of adapter ``name``, with the magnitudes that the adapter has."""
        held = self.magnitude(name)
        return y if held is None else dora.in_magnitude(self, held, y, name, inplace=inplace)

    @abstractmethod
    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        """``y``, which may be overwritten where ``inplace``, plus the update of adapter ``name`` for x."""

    def update_in_use(self, name: str, x: Tensor) -> Update:
        """The update as the forward pass takes it for x."""
        tensors, training = self.tensors(name), self.training
        if next(iter(tensors.values())).is_meta:
            tensors, training = self.present(name), False
            if next(iter(tensors.values())).is_meta and not x.is_meta:
                raise ValueError(
                    f"adapter {name!r} has parameters on the device 'meta', that is, no numbers, for an "
                    f"input on {x.device.type!r}; load the adapter, or leave it out of what is offloaded."
                )
        elif self.structure.shared and not torch.compiler.is_compiling():
            tensors = {factor: in_pass(getattr(self, factor)[name]) for factor in tensors}
        scale = self._scale(name)
        return self.structure.update(tensors, self.site, self.configs[name], scale, training=training)

    def _call(self, name: str, inplace: bool = False) -> Call:
        """How the update of an adapter is called."""
        return Call(self._dropout(name), self.probes[name], self.slots[name], inplace)

    def _dropout(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training and drops_plainly(dropout):
            return dropout.p
        return 0.0

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        """``x`` as a dropout gives it that is not the operations' own: another module, or one with hooks."""
        dropout = self.lora_dropout[name]
        if drops_plainly(dropout):
            return x
        dropped: Tensor = dropout(x)
        return dropped

    def _scale(self, name: str) -> float | Tensor:
        # A number would become part of a compiled graph, which has to outlive the growth of the rank.
        follows_rank = torch.compiler.is_compiling() and self.configs[name].scale_follows_rank
        # PEFT's rescale_adapter_scale puts a plain dictionary in the place.
        if follows_rank and isinstance(self.scaling, Scales):
            return self.scaling.in_graph(name)
        return self.scaling[name]

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.adapters:
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                result[rows] = self._updated(result[rows], x[rows], name, inplace=True)
        return result

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to ``scale`` times the configured one."""
        if adapter in self.scaling:
            self.scaling.configure(adapter, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale by ``scale``; None: back to the configured one."""
        for name in self.active_adapters:
            if name in self.adapters:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a plain low-rank product, where it has no magnitude."""
        return self.magnitude(adapter_name) is None

    def __repr__(self) -> str:
        return f"{self._method}.{super().__repr__()}"
