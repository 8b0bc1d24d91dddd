"""An adapter as a GGUF file, which llama.cpp loads beside the base model's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..support.files import staged_file
from .dtypes import in_dtype
from .gguf_bases import GgufBase, gguf_base
from .lora_format import padded
from .reading import SavedAdapter, read
from .stacked_format import matrices_of

# bfloat16 is refused: its 8 bits cost seven to ten times float16's error in what a model gives.
_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class GgufExport:
    """What :func:`export_gguf` wrote.

    Args:
        architecture: The base's architecture as llama.cpp calls it, such as "llama".
        ranks: Rank by the name of the base's matrix in its GGUF file, such as "blk.0.attn_q.weight".
    """

    architecture: str
    ranks: dict[str, int]


def export_gguf(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    adapter_name: str = "default",
) -> GgufExport:
    """Writes the adapter to the file ``out``, which llama.cpp loads by ``--lora`` beside the base's file.

    Each module keeps its own rank; experts, which stand in one matrix there, have the largest of them.
    llama.cpp multiplies the update of a matrix by the adapter's one alpha over that matrix's rank; alpha is
    the largest rank here, and B takes what is left of the module's scale. Rows of q_proj and k_proj stand in
    the order in which llama.cpp's converter writes those of the base.

    The package ``gguf`` is needed (``pip install "increlora_rs[gguf]"``), llama.cpp is not.

    Args:
        model_or_adapter_dir: A model with an adapter of one of the methods, or a directory that
            ``save_pretrained`` wrote.
        base: The base model, its configuration, its directory or its name; no weights are read. None: what
            the adapter's own configuration names.
        out: The file to write, ending in ``.gguf``. One that is there is replaced when the new one is whole.
        dtype: Of the tensors written: ``torch.float32``, or ``torch.float16`` for half the size.
        adapter_name: Which adapter of a model.

    Returns:
        Architecture and ranks that were written.

    Raises:
        ValueError: the base's class was not tried with llama.cpp, or the base is unknown; the adapter has
            what llama.cpp does not apply (DoRA, a tied embedding or head, biases, ``modules_to_save``, single
            tokens' embeddings, convolutions, other modules), does not fit the base, is damaged, or every
            module is of rank 0; ``out`` does not end in ``.gguf`` or is a model; a value is too large for
            ``dtype``, or ``dtype`` is another.
        TypeError: ``base`` is none of the above.
        ImportError: the package gguf is not installed.
        FileNotFoundError: the adapter's directory is missing.
    """
    gguf = _package()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be torch.float32 or torch.float16.")
    target = _target(gguf, out)
    adapter = read(model_or_adapter_dir, adapter_name)
    known = gguf_base(_base(base, adapter))
    _refuse_others(adapter)
    pairs = _pairs(adapter, known)
    alpha = max(b.shape[-1] for _, b in pairs.values())
    with staged_file(target) as stage:
        writer = gguf.GGUFWriter(stage, known.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # As a float: llama.cpp reads the key without asking for its type.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, (a, b) in pairs.items():
            rank = b.shape[-1]
            writer.add_tensor(f"{name}.lora_a", _numbers(a, dtype, f"A of {name}"))
            writer.add_tensor(f"{name}.lora_b", _numbers(b * (rank / alpha), dtype, f"B of {name}"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return GgufExport(known.architecture, {name: b.shape[-1] for name, (_, b) in pairs.items()})


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError('GGUF files need the package gguf: pip install "increlora_rs[gguf]"') from error
    return gguf


def _target(gguf: Any, out: str | os.PathLike[str]) -> Path:
    target = Path(out)
    if target.suffix != ".gguf" or target.is_dir():
        raise ValueError(f"out={str(target)!r} must be the name of a file that ends in .gguf.")
    if target.exists():
        try:
            field = gguf.GGUFReader(target).get_field(gguf.Keys.General.TYPE)
        except Exception:  # What is no GGUF file, or a torn one, fails in many ways.
            return target
        if field is None or bytes(field.parts[-1]) != gguf.GGUFType.ADAPTER.encode():
            raise ValueError(
                f"out={str(target)!r} is a model, which the adapter would replace; give another name."
            )
    return target


def _base(base: Any, adapter: SavedAdapter) -> Any:
    if base is not None:
        return base
    if not adapter.config.base_model_name_or_path:
        raise ValueError(
            "base=None: the adapter's configuration does not name its base model; give the model, its "
            "configuration or its directory."
        )
    return adapter.config.base_model_name_or_path


def _refuse_others(adapter: SavedAdapter) -> None:
    """Raises ValueError for what is trained beside A and B: llama.cpp refuses it or leaves it out."""
    config = adapter.config
    weights = {f"base_model.model.{name}.base_layer.weight" for name in adapter.modules}
    options = {
        "bias": config.bias if config.bias != "none" else None,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.use_dora,
    }
    found = [f"{name}={value!r}" for name, value in options.items() if value]
    found += [repr(key) for key in adapter.others if key not in weights][: 0 if found else 1]
    if found:
        raise ValueError(
            f"model_or_adapter_dir: the adapter was trained with {', '.join(found)}, which llama.cpp does "
            "not apply. Merge it with merge_and_unload() and convert the whole model, or train without."
        )


def _pairs(adapter: SavedAdapter, base: GgufBase) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module with the scale in B, shaped and ordered as llama.cpp reads them, by the name of
    the base's matrix; those of rank 0 are left out."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    parameters = {name: count for name, count in adapter.config.adapted_parameters if count}
    experts = matrices_of(parameters)
    inside = {one for ones in experts.values() for one in ones}
    for name, ones in experts.items():
        pairs |= _stacked(adapter, base.tensors_of_experts(name), ones)
    for name, module in adapter.modules.items():
        if module.rank and name not in inside:
            tensor, (a, b) = base.tensor(name), module.lora()
            rows = base.rows(tensor, b.shape[0])
            pairs[tensor] = (a.T if module.kind == "embedding" else a), b if rows is None else b[rows]
    if not pairs:
        raise ValueError(
            f"model_or_adapter_dir: each of the {len(adapter.modules)} modules has rank 0, so that the "
            "adapter does nothing and there is no file to write; train it, or use the base model."
        )
    return pairs


def _stacked(
    adapter: SavedAdapter, tensors: list[str], experts: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (E, rank, in) and B (E, out, rank) of the matrices that hold several experts, by their names; none
    where all have rank 0."""
    modules = [adapter.modules[name] for name in experts]
    rank = max(module.rank for module in modules)
    if not rank:
        return {}
    factors = [padded(*module.lora(), rank) for module in modules]
    a, b = torch.stack([a for a, _ in factors]), torch.stack([b for _, b in factors])
    return {tensor: (a, part) for tensor, part in zip(tensors, b.chunk(len(tensors), 1), strict=True)}


def _numbers(tensor: Tensor, dtype: torch.dtype, what: str) -> Any:
    """The numpy array of a tensor's values in ``dtype``."""
    return in_dtype(tensor, dtype, what, "torch.float32").cpu().contiguous().numpy()
