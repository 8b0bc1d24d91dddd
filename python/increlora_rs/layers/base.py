"""What every adapted layer has, whatever module it adapts: parameters, growth, merging, loading."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from .._core import RESERVE_E
from ..methods.increlora.config import IncreLoraConfig
from ..ops.modes import watched
from ..ops.probe import Probe
from ..ops.scales import Ranks, Scales
from ..resizing.graph import may_differ
from ..resizing.parameter import append, resize
from .call import drops_plainly, is_plain_call
from .factor import Factor
from .offload import hook_of, onloaded
from .requantised import Former
from .weight import changed_weight

_PAPER_STD = 0.02


class AdaptedLayer(nn.Module, LoraLayer, ABC):
    """A frozen module with an update ``s B diag(E) A`` of its weight whose rank can grow.

    For each adapter the parameters are ``lora_A.NAME.weight`` (rows, in), ``lora_B.NAME.weight`` (out, rows)
    and ``lora_E.NAME.weight`` (rank, 1), rows = rank + components in reserve. They alone say what the rank
    is, and they keep their identity when they grow, so optimizers and hooks that hold them stay valid. A
    subclass says what in and out are, and how the update acts.
    """

    # What the layer adapts: "linear", "transposed" (transformers' Conv1D), "embedding", "convolution".
    kind: ClassVar[str]

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

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_E")
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
        config: IncreLoraConfig,
        r: int,
        lora_alpha: float,
        probe: Probe,
        quantization: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.quantization = quantization
        self.scaling = Scales(self)
        self.lora_A = nn.ModuleDict({})
        self.lora_B = nn.ModuleDict({})
        self.lora_E = nn.ModuleDict({})
        self.configs: dict[str, IncreLoraConfig] = {}
        self.probes: dict[str, Probe] = {}
        self.slots: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, probe=probe)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: IncreLoraConfig,
        probe: Probe,
    ) -> None:
        """Creates, or creates anew, the parameters of an adapter of rank ``r``."""
        largest = self.largest_rank
        if r > largest:
            raise ValueError(
                f"rank {r} is more than {largest}, the smaller of in_features={self.in_features} and "
                f"out_features={self.out_features}; lower init_r or rank_pattern, or leave this "
                "module out of target_modules."
            )
        self.lora_alpha[adapter_name] = lora_alpha
        self.configs[adapter_name] = config
        self.probes[adapter_name] = probe
        self.slots[adapter_name] = probe.new_slot()
        self.use_rslora[adapter_name] = config.use_rslora
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        drawn = self._draw(adapter_name, r, None)
        for held, weight in zip((self.lora_A, self.lora_B, self.lora_E), drawn, strict=True):
            held[adapter_name] = Factor(weight)
        self.scaling.configure(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        hook = None if device is not None else hook_of(self.get_base_layer())
        if hook is not None:
            # The base's weight is on meta between calls, where an adapter would lose its numbers.
            device = hook.execution_device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    @property
    def largest_rank(self) -> int:
        """min(in, out): no update of this layer has a higher rank."""
        return min(self.in_features, self.out_features)

    @property
    def is_lora(self) -> bool:
        """Would PEFT's LoRA layer give the same output with the same matrices?"""
        return True

    @property
    def r(self) -> Mapping[str, int]:
        """The rank by adapter name, read off E: to change it, :meth:`grow` or :meth:`resize`."""
        return Ranks(self)

    @r.setter
    def r(self, ranks: dict[str, int]) -> None:
        # LoraLayer's constructor begins with an empty dictionary.
        if ranks:
            raise AttributeError(f"r={ranks!r}: a rank is the size of lora_E; grow() and resize() change it.")

    def rank(self, adapter_name: str) -> int:
        """Number of active components."""
        return int(self.factors(adapter_name)[2].shape[0])

    def reserve(self, adapter_name: str) -> int:
        """Number of components in reserve."""
        a, _, e = self.factors(adapter_name)
        return int(a.shape[0] - e.shape[0])

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """The parameters A (rows, in), B (out, rows), E (rank, 1), with the reserve."""
        # mypy knows no module of a ModuleDict by its class.
        a: Any = self.lora_A[adapter_name]
        b: Any = self.lora_B[adapter_name]
        e: Any = self.lora_E[adapter_name]
        return a.weight, b.weight, e.weight

    def _draw(
        self, adapter_name: str, n: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``n`` new components, float32: A (n, in), B (out, n), E (n, 1)."""
        # A generator is of the CPU; without one, the default device holds (meta while loading).
        device = None if generator is None else generator.device
        a = torch.empty(n, self.in_features, device=device)
        b = torch.zeros(self.out_features, n, device=device)
        config = self.configs[adapter_name]
        if config.init_lora_weights == "svd":
            a.normal_(0.0, _PAPER_STD, generator=generator)
            b.normal_(0.0, _PAPER_STD, generator=generator)
            return a, b, torch.zeros(n, 1, device=device)
        self._fill(a, b, config, generator)
        return a, b, torch.ones(n, 1, device=device)

    def _fill(self, a: Tensor, b: Tensor, config: IncreLoraConfig, generator: torch.Generator | None) -> None:
        """LoRA's initialisation of A, in place; B, which is 0, stays so unless the config wants it random."""
        if config.init_lora_weights == "gaussian":
            # LoRA divides by the rank; the rank at the end is r.
            a.normal_(0.0, 1.0 / config.r, generator=generator)
            return
        bound = 1.0 / math.sqrt(self.in_features)
        a.uniform_(-bound, bound, generator=generator)
        if config.init_lora_weights is False:
            b.uniform_(-bound, bound, generator=generator)

    def grow(
        self,
        adapter_name: str,
        components: int,
        generator: torch.Generator,
        directions: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Makes ``components`` more components active: first those in reserve, then new ones.

        Parameters keep their identity and lose their ``grad``; new rows stand at the end. ``directions``
        holds unit vectors, columns (out, n) and rows (n, in), that the first n new components take, each as
        long as its random one is.

        Raises:
            ValueError: the adapter is merged, or the rank would pass min(in, out).
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is merged into the base weight and cannot grow; call "
                "unmerge_adapter() first."
            )
        old_rank = self.rank(adapter_name)
        rank = old_rank + components
        if rank > self.largest_rank:
            raise ValueError(
                f"components={components}: rank {rank} would be more than min(in, out) = "
                f"{self.largest_rank}; give {self.largest_rank - old_rank} or fewer."
            )
        from_reserve = min(components, self.reserve(adapter_name))
        drawn_a, drawn_b, drawn_e = self._draw(adapter_name, components - from_reserve, generator)
        if directions is not None:
            _point(drawn_b, directions[0], 0)
            _point(drawn_a, directions[1], 1)
        reserve_e = torch.full((from_reserve, 1), RESERVE_E, device=generator.device)
        a, b, e = self.factors(adapter_name)
        rescaled = self.rescaled_by_growth(adapter_name, old_rank, rank)
        if rescaled != 1.0:
            with torch.no_grad():
                e.mul_(rescaled)
        append(a, drawn_a, 0)
        append(b, drawn_b, 1)
        append(e, torch.cat([reserve_e, drawn_e]), 0)

    def rescaled_by_growth(self, adapter_name: str, old_rank: int, rank: int) -> float:
        """What a growth from ``old_rank`` to ``rank`` multiplies the old rows of E by."""
        config, alpha = self.configs[adapter_name], self.lora_alpha[adapter_name]
        if not config.preserve_output:
            return 1.0
        return config.scale(alpha, old_rank) / config.scale(alpha, rank)

    def set_reserve(
        self, adapter_name: str, components: int, generator: torch.Generator | None = None
    ) -> None:
        """Draws, or drops, components so that ``components`` are in reserve."""
        rows = self.rank(adapter_name) + components
        a, b, _ = self.factors(adapter_name)
        missing = rows - int(a.shape[0])
        if missing > 0:
            drawn_a, drawn_b, _ = self._draw(adapter_name, missing, generator)
            self.add_reserve(adapter_name, drawn_a, drawn_b)
        elif missing < 0:
            resize(a, a.detach()[:rows].clone(memory_format=torch.contiguous_format))
            resize(b, b.detach()[:, :rows].clone(memory_format=torch.contiguous_format))

    def add_reserve(self, adapter_name: str, a: Tensor, b: Tensor) -> None:
        """Puts given components in reserve: A (n, in), B (out, n)."""
        own_a, own_b, _ = self.factors(adapter_name)
        append(own_a, a, 0)
        append(own_b, b, 1)

    def resize(self, adapter_name: str, rank: int, rows: int | None = None) -> None:
        """Gives the adapter ``rank`` active of ``rows`` components (None: no reserve), values
        undefined: for loading."""
        rows = rank if rows is None else rows
        a, b, e = self.factors(adapter_name)
        if rank == e.shape[0] and rows == a.shape[0] == b.shape[1]:
            return
        resize(a, a.new_zeros(rows, self.in_features))
        resize(b, b.new_zeros(self.out_features, rows))
        resize(e, e.new_zeros(rank, 1))
        self.probes[adapter_name].reloaded = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A checkpoint of another rank: the parameters take its shape, whatever loads it.
        for name in list(self.lora_A.keys()):
            keys = [f"{prefix}lora_{factor}.{name}" for factor in "ABE"]
            for key in keys:
                # The names of 0.1.0's first adapters, whose factors were parameters themselves.
                if key in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
            a, b, e = (state_dict.get(f"{key}.weight") for key in keys)
            if a is None or b is None or e is None or a.dim() != 2 or e.dim() != 2:
                continue
            rows, rank = int(a.shape[0]), int(e.shape[0])
            fit = a.shape[1] == self.in_features and tuple(b.shape) == (self.out_features, rows)
            if fit and e.shape[1] == 1 and 1 <= rank <= rows:
                self.resize(name, rank, rows)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def active_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A (rank, in), B (out, rank), E (rank, 1) without the reserve: views of the parameters."""
        a, b, e = self.factors(adapter_name)
        if a.is_meta:
            with onloaded(self.lora_A, self.lora_B, self.lora_E):
                a, b, e = self.factors(adapter_name)
        rank = e.shape[0]
        if may_differ(a.shape[0], rank):
            return a[:rank], b[:, :rank], e
        return a, b, e

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update s B diag(E) A in the shape of the base weight, in the dtype of the parameters."""
        a, b, e = self.active_factors(adapter)
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(wide) * e.to(wide).view(-1)) @ a.to(wide) * self.scaling[adapter]
        return self._as_weight(delta).to(a.dtype)

    def _as_weight(self, delta: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the base weight."""
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters (None: the active ones) to the base weight.

        A quantised weight is dequantised and quantised anew, with a warning, where its library can.

        Raises:
            ValueError: the base weight cannot be changed, or, with ``safe_merge``, the result is not
                finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                former = changed_weight(self, self.get_delta_weight(name), name, check_finite=safe_merge)
                if not self.merged_adapters:
                    self._former = former
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes all merged updates out of the base weight again.

        A quantised weight is put back as it was; the merged layer keeps it for that.
        """
        if not self.merged:
            warnings.warn("no adapter is merged, so there is nothing to unmerge", stacklevel=2)
        former, self._former = self._former, None
        if former is not None and former.put_back(self.get_base_layer()):
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                changed_weight(self, -self.get_delta_weight(name), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus the active adapters' updates."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.base_layer
        if self.disable_adapters or self.merged:
            return base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(base(x, *args, **kwargs), x, adapter_names)
        names = [name for name in self.active_adapters if name in self.lora_A]
        unwatched = not watched()
        # Nobody else sees what comes out, which is fresh memory then.
        fresh = unwatched and is_plain_call(base)
        fusable = names and fresh and not args and not kwargs and drops_plainly(self.lora_dropout[names[0]])
        result = self._fused(x, names[0]) if fusable else None
        if result is None:
            result = base(x, *args, **kwargs)
            if self.training and x.requires_grad and not result.requires_grad and torch.is_grad_enabled():
                raise ValueError(self._no_gradient())
        else:
            names = names[1:]
        for name in names:
            result = self._added(result, x, name, inplace=fresh)
            fresh = unwatched
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

    @abstractmethod
    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        """``y``, which may be overwritten where ``inplace``, plus the update of adapter ``name`` for x."""

    def _factors_in_use(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, B, E as the forward pass takes them for x: in training with the reserve, which learns."""
        if self.training:
            factors: tuple[Tensor, Tensor, Tensor] = self.factors(name)
            if not factors[0].is_meta:
                return factors
        factors = self.active_factors(name)
        if factors[0].is_meta and not x.is_meta:
            raise ValueError(
                f"adapter {name!r} has parameters on the device 'meta', that is, no numbers, for an input on "
                f"{x.device.type!r}; load the adapter, or leave it out of what is offloaded."
            )
        return factors

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
        follows_rank = torch.compiler.is_compiling() and self.configs[name].scaling == "rank"
        # PEFT's rescale_adapter_scale puts a plain dictionary in the place.
        if follows_rank and isinstance(self.scaling, Scales):
            return self.scaling.in_graph(name)
        return self.scaling[name]

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.lora_A:
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                result[rows] = self._added(result[rows], x[rows], name, inplace=True)
        return result

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to ``scale`` times the configured one."""
        if adapter in self.scaling:
            self.scaling.configure(adapter, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale by ``scale``; None: back to the configured one."""
        for name in self.active_adapters:
            if name in self.lora_A:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a plain low-rank product."""
        return True

    def __repr__(self) -> str:
        return "increlora." + super().__repr__()


def _point(drawn: Tensor, directions: Tensor, dim: int) -> None:
    """Gives vectors that lie along ``dim`` new directions, the first ones, and leaves their lengths."""
    n = min(drawn.shape[1 - dim], directions.shape[1 - dim])
    first = drawn.narrow(1 - dim, 0, n)
    given = directions.narrow(1 - dim, 0, n).to(device=drawn.device, dtype=drawn.dtype)
    first.copy_(given * first.norm(dim=dim, keepdim=True))
