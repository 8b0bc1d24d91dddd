"""Loading a checkpoint of ``torch.distributed.checkpoint`` whose ranks are not the model's.

Its ``load`` fills tensors in that have the checkpoint's sizes already; those of a grown adapter are larger
than a fresh model's, and so is its optimizer's state.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from ..layers import AdaptedLayer
from ..layers.found import all_adapted_layers
from ..resizing.cut import here
from .fit import unwrapped_optimizer

_STATE, _GROUPS, _MEMBERS = "state", "param_groups", "params"
# What wrappers put into the names of parameters, and torch.distributed.checkpoint takes out.
_WRAPPING = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}

_Path = tuple[str | int, ...]


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | StorageReader,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Loads what ``torch.distributed.checkpoint.save`` or ``async_save`` wrote, whatever its ranks.

    The adapter takes the checkpoint's ranks, and everything else of the model that is in the checkpoint its
    values; frozen weights may be missing. It finds the state dicts by their names, at the top of the
    checkpoint or below any key. In several processes all have to call it.

    Args:
        model: A model with the adapter that was saved, of any ranks, wrapped or not.
        checkpoint: The checkpoint's directory, or a reader of another storage.
        optimizer: The optimizer that goes on, made as the one whose state was saved by
            ``get_optimizer_state_dict`` (or by its own ``state_dict``). :func:`attach` may be called before
            or after; the ranks go on growing as if there had been no break.
        process_group: As for ``torch.distributed.checkpoint.load``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read, or is of another model; it holds no optimizer's state, or several. But
            for a damaged file, the model is as it was.
        TypeError: ``optimizer`` is none of torch.
    """
    inner = model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = inner.module
    saved = _Saved(checkpoint)
    factors, others = _destinations(inner, saved)
    states: dict[str, Any] = {}
    if optimizer is not None:
        optimizer = unwrapped_optimizer(optimizer)
        states = saved.empty_optimizer_state()
    values = factors | others | states
    saved.read_into(values, process_group)
    with torch.no_grad():
        names = {_plain(name): name for name, _ in inner.named_parameters()}
        own = {names[key.removeprefix(saved.prefix)]: values[key] for key in factors}
        inner.load_state_dict(own, strict=False)
    if optimizer is not None:
        read = {saved.paths[key][len(saved.optimizer_path()) :]: values[key] for key in states}
        _load_optimizer(inner, optimizer, read)


def take_sizes(model: nn.Module, checkpoint: str | os.PathLike[str] | StorageReader) -> None:
    """Gives the adapter in ``model`` the ranks that it has in a checkpoint of accelerate's, values undefined.

    Its parameters have the model's names there, or PEFT's, in which the adapter's name is missing, below
    "model."; where one has neither, nothing is done for its module.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or it cannot be read.
    """
    saved = _Saved(checkpoint)
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLayer):
            continue
        for adapter in layer.adapters:
            start, found = f"model.{_plain(name)}", {}
            for factor in layer.structure.names:
                for key in (f"{start}.{factor}.{adapter}.weight", f"{start}.{factor}.weight"):
                    size = saved.size(key) if key in saved.entries else None
                    if size is not None:
                        found[factor] = tuple(size)
            if len(found) == len(layer.structure.names):
                layer.take_sizes(adapter, found)


class _Saved:
    """A checkpoint's table of contents.

    Attributes:
        prefix: What stands before the names of the model's parameters; set by :func:`_destinations`.
        factors: What the parameters of the model's adapters are called; likewise.
        tensors: Sizes by key.
        paths: Where in the nested state dicts each key stood.
    """

    def __init__(self, checkpoint: Any) -> None:
        self.prefix = ""
        self.factors: frozenset[str] = frozenset()
        self.name = checkpoint
        self.reader = checkpoint
        if not isinstance(checkpoint, StorageReader):
            folder = Path(checkpoint)
            if not (folder / ".metadata").is_file():
                raise FileNotFoundError(
                    f"checkpoint: {folder} holds no checkpoint of torch.distributed.checkpoint: its file "
                    ".metadata is missing. Give the directory that was saved to, once the save is complete."
                )
            self.reader = FileSystemReader(folder)
        try:
            self._metadata = self.reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(
                f"checkpoint: the metadata of {self.name} cannot be read: {error}. Take another checkpoint."
            ) from error
        paths = self._metadata.planner_data or {}
        self.entries = self._metadata.state_dict_metadata
        self.paths: dict[str, _Path] = {key: tuple(paths.get(key, (key,))) for key in self.entries}

    def optimizer_path(self) -> _Path:
        """Where the optimizer's state stands."""
        found = {
            path[:k]
            for path in self.paths.values()
            for k, part in enumerate(path)
            if part == _GROUPS or str(part).startswith(f"{_GROUPS}.")
        }
        if len(found) != 1:
            places = sorted(".".join(map(str, path)) or "the top" for path in found)
            raise ValueError(
                f"checkpoint: {self.name} holds {len(found)} optimizers' states {places}, and one is wanted; "
                "save that of get_optimizer_state_dict(model, optimizer) beside the model's, or leave "
                "optimizer out and load it by itself."
            )
        return found.pop()

    def empty_optimizer_state(self) -> dict[str, Any]:
        """Room for the optimizer's state, by key."""
        start = self.optimizer_path()
        keys = [
            key
            for key, path in self.paths.items()
            if path[: len(start)] == start and len(path) > len(start) and _is_optimizers(path[len(start)])
        ]
        return {key: self.empty(key) for key in keys}

    def empty(self, key: str) -> Any:
        """A tensor of the size that key ``key`` has; None for what is no tensor."""
        entry = self.entries[key]
        if isinstance(entry, TensorStorageMetadata):
            return torch.empty(entry.size, dtype=entry.properties.dtype)
        return None

    def size(self, key: str) -> torch.Size | None:
        """The size of a tensor; None for what is no tensor."""
        entry = self.entries[key]
        return entry.size if isinstance(entry, TensorStorageMetadata) else None

    def of_factors(self) -> set[str]:
        """Keys of adapters' factors, the optimizer's state of them left out."""
        return {
            key
            for key, path in self.paths.items()
            if key.startswith(self.prefix)
            and not any(map(_is_optimizers, path))
            and self.factors.intersection(key.split("."))
        }

    def read_into(self, values: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
        """Fills ``values`` in, in place but for what is no tensor."""
        # The keys are the checkpoint's: nothing is to be flattened.
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
            try:
                load(values, storage_reader=self.reader, planner=planner, process_group=process_group)
            except CheckpointException as error:
                # Not an Exception: `except Exception` of a training script would miss it.
                raise ValueError(
                    f"checkpoint: {self.name} cannot be read: {error}. Take another checkpoint."
                ) from error


def _is_optimizers(part: str | int) -> bool:
    return str(part) in (_STATE, _GROUPS) or str(part).startswith((f"{_STATE}.", f"{_GROUPS}."))


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPING)


def _destinations(model: nn.Module, saved: _Saved) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors to read into, by the checkpoint's keys: new ones for adapters' factors, in the checkpoint's
    sizes; the model's own for all else."""
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters()}
    growing = _growing(model)
    saved.prefix = _prefix(growing, saved)
    saved.factors = frozenset(name for layer in all_adapted_layers(model) for name in layer.structure.names)
    _check_names(parameters, saved)
    factors: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    buffers = {_plain(name): buffer for name, buffer in model.named_buffers()}
    for name, tensor in (parameters | buffers).items():
        key = saved.prefix + name
        if key not in saved.entries:
            continue
        size = saved.size(key)
        if size is not None and name in growing and _differ_in_rank(size, tensor.shape):
            factors[key] = here(tensor.detach()).new_empty(size)
        elif size == tensor.shape:
            others[key] = tensor.detach()
        else:
            raise ValueError(
                f"checkpoint: {key!r} of {saved.name} has the size {size and tuple(size)}, in the model "
                f"{tuple(tensor.shape)}; load it into the model that was trained."
            )
    return factors, others


def _growing(model: nn.Module) -> list[str]:
    """Names of the parameters that grow."""
    return [
        _plain(f"{layer}.{name}" if layer else name)
        for layer, module in model.named_modules()
        if isinstance(module, AdaptedLayer)
        for name, _ in module.named_parameters()
        if name.split(".")[0] in module.structure.names
    ]


def _differ_in_rank(one: Iterable[int], other: Iterable[int]) -> bool:
    """Are two sizes equal but for at most one number?"""
    one, other = tuple(one), tuple(other)
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 1


def _prefix(growing: list[str], saved: _Saved) -> str:
    """What stands before the model's names in the checkpoint, as ``model.``"""
    if not growing:
        raise ValueError(
            "model: it has no adapter of increlora_rs; make it with get_peft_model and the configuration of "
            "the training whose checkpoint is loaded."
        )
    first = growing[0]
    candidates = [
        key.removesuffix(first)
        for key, path in saved.paths.items()
        if (key == first or key.endswith(f".{first}")) and not any(map(_is_optimizers, path))
    ]
    whole = [start for start in candidates if all(start + name in saved.entries for name in growing)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ValueError(
            f"checkpoint: {saved.name} holds the model {len(whole)} times, below {whole}; save the one to go "
            "on with in a checkpoint of its own."
        )
    held = {start + name for start in candidates[:1] for name in growing}
    missing = sorted(held - saved.entries.keys()) if candidates else [first]
    raise ValueError(
        f"checkpoint: {saved.name} has no {missing[0]!r}, and {len(missing)} of the adapter's parameters are "
        "missing; load it into the model that was trained, with the same target_modules and adapter name, "
        "and save what get_model_state_dict gives."
    )


def _check_names(parameters: dict[str, nn.Parameter], saved: _Saved) -> None:
    unknown = sorted(saved.of_factors() - {saved.prefix + name for name in parameters})
    if unknown:
        raise ValueError(
            f"checkpoint: {saved.name} has {unknown[0]!r}, and {len(unknown)} of its adapters' parameters "
            "are not in the model; load it into the model that was trained, with the same target_modules "
            "and adapters."
        )
    for name, parameter in parameters.items():
        if parameter.requires_grad and saved.prefix + name not in saved.entries:
            raise ValueError(
                f"checkpoint: {saved.name} has no {saved.prefix + name!r}, which the model trains; load it "
                "into the model that was trained, with the same modules_to_save."
            )


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, read: dict[_Path, Any]) -> None:
    nested = [path[0] in (_STATE, _GROUPS) for path in read]
    state = _nested(read) if all(nested) else _by_parameter(model, optimizer, read)
    state.setdefault(_STATE, {})
    if all(key.isdigit() for key in state[_STATE]) and _numbered(state[_GROUPS]):
        # Of the optimizer's own state_dict, where parameters have numbers.
        state[_STATE] = {int(key): value for key, value in state[_STATE].items()}
        optimizer.load_state_dict(state)
        return
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group[_MEMBERS])
    # A parameter that no step has used has no state.
    options = StateDictOptions(full_state_dict=sharded, strict=False)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _numbered(groups: list[dict[str, Any]]) -> bool:
    return all(isinstance(member, int) for group in groups for member in group[_MEMBERS])


def _nested(read: dict[_Path, Any]) -> dict[str, Any]:
    root: dict[Any, Any] = {}
    for path, value in read.items():
        place = root
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    made: dict[str, Any] = _with_lists(root)
    return made


def _with_lists(value: Any) -> Any:
    """``value`` with lists for the dictionaries whose keys are numbers."""
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {key: _with_lists(part) for key, part in value.items()}


def _by_parameter(
    model: nn.Module, optimizer: torch.optim.Optimizer, read: dict[_Path, Any]
) -> dict[str, Any]:
    """The nested form of a state that ``flatten_optimizer_state_dict=True`` made."""
    # torch's own way back leaves out what the live optimizer does not have yet, a scheduler's state.
    names = {id(parameter): _plain(name) for name, parameter in model.named_parameters()}
    known = set(names.values())
    parts: dict[str, dict[str, dict[_Path, Any]]] = {_STATE: {}, _GROUPS: {}}
    for path, value in read.items():
        kind, *words = [word for part in path for word in str(part).split(".")]
        for cut in range(len(words) - 1, 0, -1):
            name = ".".join(words[:cut])
            if name in known:
                parts[kind].setdefault(name, {})[tuple(words[cut:])] = value
                break
    groups = []
    for group in optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group[_MEMBERS]]
        settings = next((parts[_GROUPS][name] for name in members if name in parts[_GROUPS]), {})
        groups.append(_nested(settings) | {_MEMBERS: members})
    return {_STATE: {name: _nested(state) for name, state in parts[_STATE].items()}, _GROUPS: groups}
