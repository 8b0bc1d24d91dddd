"""What the backward pass keeps, counted in bytes, and the peak of a process's memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from . import floor, methods
from .methods import FROZEN, METHODS, PRECISIONS, batch, training_model
from .sizes import NAMED, LayerCase, Size
from .step import forward_backward

Batch = tuple[Tensor, Tensor]
_Prepared = TypeVar("_Prepared")

_PASSES = 3
_ROOT = Path(__file__).parent.parent


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of the storages that autograd saves in ``forward``, each once, those of ``parameters`` left
    out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    # Storages are told apart by address, which a freed one would give to the next.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(sizes.values())


def measure(size: Size) -> dict[str, Any]:
    """``layer``, ``shared`` (query, key and value on one input) and ``model``: saved bytes of every
    method; ``peak``: bytes that training adds to a process that holds the model."""
    shapes = [case.shape for case in size.layer_cases]
    tokens, precisions = size.batch * size.tokens, size.precisions
    cases = [(LayerCase(shape, tokens, size.rank), 1) for shape in dict.fromkeys(shapes)]
    cases.append((LayerCase((size.width, size.width), tokens, size.rank), 3))
    settings = [(p, d) for p in precisions for d in size.dropouts]
    return {
        "layer": [
            _layers(case, count, precision, dropout, size.device)
            for case, count in track(cases, description="memory: saved by layers")
            for precision, dropout in settings
        ],
        "model": [_model(size, *s) for s in track(settings, description="memory: saved by the model")],
        "peak": [
            {"precision": precision, "dropout": size.dropouts[-1], "method": method}
            | peak(size, method, precision, size.dropouts[-1])
            for precision in size.peaks
            for method in track(METHODS, description=f"memory: peak, {precision}")
        ],
    }


def _layers(case: LayerCase, count: int, precision: str, dropout: float, device: str) -> dict[str, Any]:
    kind = PRECISIONS[precision]
    saved = {}
    for method in METHODS:
        layers = methods.adapted_layers(
            method, case.shape, precision=kind, rank=case.rank, dropout=dropout, device=device, count=count
        )
        source = torch.randn(case.tokens, case.shape[0]).to(device, kind.base).requires_grad_()

        def forward(layers: list[nn.Module] = layers, source: Tensor = source) -> Tensor:
            # An activation, which frozen layers would not keep.
            x = source * 1.0
            outputs: Tensor = torch.stack([layer(x) for layer in layers])
            return outputs

        saved[method] = saved_bytes(forward, [p for layer in layers for p in layer.parameters()])
    element = floor.ELEMENT[precision]
    return {
        "shape": list(case.shape),
        "tokens": case.tokens,
        "rank": case.rank,
        "layers": count,
        "precision": precision,
        "dropout": dropout,
        "bytes": saved,
        "floor": floor.saved_bytes(case.shape, case.tokens, case.rank, dropout, element, layers=count),
    }


def _model(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    data = batch(size, PRECISIONS[precision])
    saved = {}
    for method in METHODS:
        model = training_model(method, size, precision=PRECISIONS[precision], dropout=dropout)
        parameters: list[Tensor] = [*model.parameters(), *data]
        saved[method] = saved_bytes(lambda model=model: model(*data).loss, parameters)  # type: ignore[misc]
    return {"precision": precision, "dropout": dropout, "bytes": saved}


def adapters_bytes(saved: dict[str, int], method: str) -> int:
    """What the adapters of ``method`` save: all but what the frozen model saves too."""
    return saved[method] - saved[FROZEN]


def peak(size: Size, method: str, precision: str, dropout: float) -> dict[str, int]:
    """With the model built, and at most in its training passes: resident bytes of a new process; on a GPU
    bytes of tensors there."""
    case = method, precision, dropout
    return peak_of("benches.memory", size, case, lambda: _prepared(size, *case), _train)


def peak_of(
    module: str,
    size: Size,
    case: tuple[str, str, float],
    prepare: Callable[[], _Prepared],
    train: Callable[[_Prepared], None],
) -> dict[str, int]:
    """As :func:`peak`, of what ``train`` does with what ``prepare`` makes; ``module`` calls
    :func:`print_peak` with them where it is run with the name of the size and the ``case``."""
    if size.device == "cuda":
        return _peak_of_device(prepare, train)
    name = next(name for name, known in NAMED.items() if known is size)
    return _peak_of_process(module, [name, *map(str, case)])


def _peak_of_process(module: str, arguments: list[str]) -> dict[str, int]:
    path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
    answer = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    result: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
    return result


def _peak_of_device(prepare: Callable[[], _Prepared], train: Callable[[_Prepared], None]) -> dict[str, int]:
    gc.collect()
    before = torch.cuda.memory_allocated()
    prepared = prepare()
    built = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(prepared)
    return {"built": built - before, "peak": torch.cuda.max_memory_allocated() - before}


def _prepared(size: Size, method: str, precision: str, dropout: float) -> tuple[nn.Module, Batch]:
    kind = PRECISIONS[precision]
    return training_model(method, size, precision=kind, dropout=dropout), batch(size, kind)


def _train(prepared: tuple[nn.Module, Batch]) -> None:
    for _ in range(_PASSES):
        forward_backward(*prepared)


def print_peak(prepare: Callable[[], _Prepared], train: Callable[[_Prepared], None]) -> None:
    """Prints as JSON what :func:`peak` returns, of this process, which must have done nothing before."""
    prepared = prepare()
    built = _resident("VmRSS")
    train(prepared)
    print(json.dumps({"built": built, "peak": _resident("VmHWM")}))


def _resident(field: str) -> int:
    # Bytes that the system says this process has.
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _main(name: str, method: str, precision: str, dropout: str) -> None:
    print_peak(lambda: _prepared(NAMED[name], method, precision, float(dropout)), _train)


if __name__ == "__main__":
    from .timing import prepare

    prepare()
    _main(*sys.argv[1:])
