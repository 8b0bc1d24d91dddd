"""Parameters that are adapted themselves and not by a layer that is called: the experts of a mixture, of
which several stand in one parameter, and their routers.

An expert is a module of its own, with a rank of its own. What holds the parameter is called with the updates
in it, whatever it computes: loops, grouped and batched products, biases, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn
from torch.func import functional_call

from ..ops.stacked import add_stacked, shown
from ..ops.untouched import asks
from ..ops.update import LowRank
from ..support.sites import Site
from ..support.untraced import untraced
from .base import AdaptedLayer
from .offload import hook_of
from .requantised import Former
from .weight import check_finite_sum, is_plain


class Matrix(nn.Module):
    """A matrix of a parameter of another module, which is not registered here: ``weight`` is a view of it.

    Args:
        holder: The module that holds the parameter.
        parameter: Its name there.
        number: Which matrix of (E, ..., ...); None: the parameter is the matrix.
        transposed: Does it stand as (in, out)?
    """

    def __init__(self, holder: nn.Module, parameter: str, number: int | None, transposed: bool) -> None:
        super().__init__()
        # In a tuple, which is no submodule.
        self._holder, self._parameter, self._number = (holder,), parameter, number
        self.transposed = transposed
        out, features = self.weight.shape
        self.in_features, self.out_features = (out, features) if transposed else (features, out)

    @property
    def is_one_of_several(self) -> bool:
        """Are there others in the parameter?"""
        return self._number is not None

    @property
    def weight(self) -> Tensor:
        """The matrix as it stands in the parameter."""
        held: Tensor = self._holder[0]._parameters[self._parameter]  # type: ignore[assignment]
        return held if self._number is None else held[self._number]


class AdaptedMatrix(AdaptedLayer):
    """A matrix of a parameter with its update: an expert of a projection, or a router.

    It is not called: :class:`AdaptedParameters` is, with the updates of all matrices in their places.
    """

    kind: ClassVar[str] = "linear"

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _site(self, name: str) -> Site:
        # An expert is, in a step in which no token comes to it.
        self.may_be_idle = self.get_base_layer().is_one_of_several
        return super()._site(name)

    def acting(self) -> list[str]:
        """The adapters whose updates are to be added to the matrix."""
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return []
        if self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.configs]

    def in_use(self, name: str) -> LowRank:
        """The update as a forward pass takes it."""
        # As they are, for there is no capacity form of them: hundreds are asked for in a pass.
        tensors = dict(zip(self.structure.names, self.trained(name), strict=True))
        update: LowRank = self.structure.update(
            tensors, self.site, self.configs[name], self.scaling[name], training=self.training
        )
        return update

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t() if self.get_base_layer().transposed else delta

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix (out, in)."""
        return weight.t() if self.get_base_layer().transposed else weight

    def _changed_weight(self, name: str, sign: int = 1, *, safe: bool = False) -> Former | None:
        if self.rank(name) == 0:
            return None
        weight = self.get_base_layer().weight.data
        if not is_plain(weight) or weight.is_meta:
            raise ValueError(
                f"adapter {name!r} cannot be merged into {self.site.name!r}, of type {type(weight).__name__} "
                f"on {weight.device.type!r}; load the base model unquantised, and whole, to merge."
            )
        delta = self.get_delta_weight(name).to(weight.device) * sign
        if safe:
            check_finite_sum(weight, delta, name)
        weight += delta.to(weight.dtype)
        return None

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> NoReturn:
        self.forward()

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """It is not called.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.site.name!r} is a part of a parameter, and is not called; call the module that holds it, "
            "which has the updates of all parts."
        )


class AdaptedParameters(nn.Module):
    """A module of which parameters are adapted: each is a matrix, or several of one shape.

    Its attributes are those of the module in it, but for the adapted parameters' names, by which it holds an
    :class:`AdaptedMatrix`, or a list of them.

    Args:
        base_layer: The module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            # It is missing while a copy is being made.
            if "base_layer" not in modules or name.startswith("__"):
                raise
            return getattr(modules["base_layer"], name)

    def matrices(self) -> dict[str, list[AdaptedMatrix]]:
        """Those of each adapted parameter, by its name."""
        held: dict[str, Any] = {name: one for name, one in self._modules.items() if name != "base_layer"}
        return {
            name: [one] if isinstance(one, AdaptedMatrix) else list(one._modules.values())
            for name, one in held.items()
        }

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the active adapters' updates in its parameters.

        Raises:
            ValueError: a parameter is split over processes or offloaded.
        """
        replaced = {}
        for name, matrices in self.matrices().items():
            weight = self._updated(name, matrices)
            if weight is not None:
                replaced[name] = weight
        if not replaced:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, replaced, args, kwargs)

    def _updated(self, name: str, matrices: list[AdaptedMatrix]) -> Tensor | None:
        """The parameter with all updates; None where there is none."""
        weight: Any = self.base_layer._parameters[name]
        acting = [matrix.acting() for matrix in matrices]
        result = None
        for adapter in dict.fromkeys(one for names in acting for one in names):
            numbers = [k for k, names in enumerate(acting) if adapter in names]
            if len(numbers) < len(matrices):
                raise ValueError(
                    f"adapter {adapter!r} is merged, or disabled, in some matrices of {name!r} and not in "
                    "all; call merge_adapter() or unmerge_adapter() of the model."
                )
            updates = [matrix.in_use(adapter) for matrix in matrices]
            probe = matrices[0].probes[adapter]
            if not any(len(update.a) for update in updates) and not asks(probe):
                continue
            if result is None:
                self._check(name, weight)
                result = weight
            transposed = matrices[0].get_base_layer().transposed
            result = add_stacked(result, updates, transposed=transposed)
            slots = [matrix.slots[adapter] for matrix in matrices]
            result = shown(result, updates, probe, slots, transposed=transposed)
        return result

    def _check(self, name: str, weight: Any) -> None:
        offloaded = weight is not None and weight.is_meta and hook_of(self.base_layer) is not None
        if weight is None or not is_plain(weight) or offloaded:
            what = "offloaded" if offloaded else f"of type {type(weight).__name__}"
            raise ValueError(
                f"target_parameters: {name!r} of a {type(self.base_layer).__name__} is {what}, and no update "
                "can be added to it; load the base model unquantised and whole."
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The module itself, with the updates in its parameters or without them; PEFT calls it."""
        if merge:
            for matrix in self._all():
                matrix.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def _all(self) -> Iterator[AdaptedMatrix]:
        for matrices in self.matrices().values():
            yield from matrices


def adapt_parameter(
    holder: AdaptedParameters, parameter: str, name: str, make: Callable[[Matrix, str], AdaptedMatrix]
) -> None:
    """Gives ``holder`` the adapted matrices of one of its parameters.

    Args:
        holder: What is called in the place of the module that holds it.
        parameter: Its name there.
        name: Its full name in the model.
        make: Makes the :class:`AdaptedMatrix` of a :class:`Matrix` and its full name.

    Raises:
        ValueError: it is no matrix, and no stack of them; or its numbers are not to be had.
    """
    base = holder.base_layer
    weight: Any = base._parameters[parameter]
    if not is_plain(weight) or not weight.is_floating_point():
        raise ValueError(
            f"it is of type {type(weight).__name__}, dtype {weight.dtype}, quantised or split over "
            "processes, and no update can be added to it; load the base model unquantised and whole."
        )
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"it has the shape {tuple(weight.shape)}; a matrix can be adapted, or several in one parameter "
            "of three dimensions."
        )
    if hook_of(base) is not None:
        raise ValueError(
            f"a {type(base).__name__} is offloaded, and its parameters are not there between its calls; load "
            "the base model whole."
        )
    if weight.dim() == 2:
        setattr(holder, parameter, make(Matrix(base, parameter, None, False), name))
        return
    # As PEFT takes them, and Transformers marks them.
    transposed = bool(getattr(base, "is_transposed", False))
    experts = nn.ModuleList()
    for number in range(weight.shape[0]):
        experts.append(make(Matrix(base, parameter, number, transposed), f"{name}.{number}"))
    setattr(holder, parameter, experts)
