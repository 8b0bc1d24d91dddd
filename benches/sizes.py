"""How much is measured: the full run, a quick one, and one that only shows that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

BERT = ((768, 768), (768, 3072), (3072, 768))
LLAMA = ((2048, 2048), (2048, 5632), (4096, 4096))


@dataclass(frozen=True)
class LayerCase:
    """One row of the layer table: a shape (in, out), tokens, rank."""

    shape: tuple[int, int]
    tokens: int
    rank: int


@dataclass(frozen=True)
class Size:
    """What a run measures.

    Args:
        layer_cases: Rows of the layer table, each for every precision and dropout.
        precisions: Names of :data:`benches.methods.PRECISIONS`.
        seconds: Time that one comparison of layers may take, warm-up aside.
        rounds: Rounds of one comparison, at least and at most.
        step_seconds, step_warmup: Time that one comparison of steps may take, rounds thrown away.
        training_steps: Those of a whole training.
        events: Growth events that are timed.
        width, layers, batch, tokens, rank: The model of the training step, and its adapters.
        modules: Numbers of modules for the scheduler.
        module_width: Width of those modules.
        intervals: Growth intervals that the scheduler is watched for.
        large_bytes: Size of the tensor whose copy gives the bandwidth.
        dropouts: Probabilities; the last is the one of the whole steps.
        peaks: Precisions for which processes are started to see their peak of memory.
        device: Where everything is computed.
    """

    layer_cases: tuple[LayerCase, ...]
    precisions: tuple[str, ...] = ("float32", "bfloat16", "bfloat16 throughout")
    seconds: float = 1.5
    rounds: tuple[int, int] = (5, 25)
    step_seconds: float = 35.0
    step_warmup: int = 2
    training_steps: int = 50
    events: int = 3
    width: int = 768
    layers: int = 3
    batch: int = 16
    tokens: int = 128
    rank: int = 8
    modules: tuple[int, ...] = (10, 100, 500, 1000)
    module_width: int = 768
    intervals: int = 3
    large_bytes: int = 1 << 28
    dropouts: tuple[float, ...] = (0.0, 0.1)
    peaks: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"


def _full() -> Size:
    cases = [LayerCase(shape, tokens, 8) for shape in BERT for tokens in (256, 1024, 2048, 8192)]
    cases += [LayerCase(LLAMA[0], tokens, 8) for tokens in (256, 1024, 2048)]
    cases += [LayerCase(shape, tokens, 8) for shape in LLAMA[1:] for tokens in (256, 1024)]
    cases += [LayerCase(shape, 2048, rank) for shape in BERT for rank in (2, 64)]
    cases += [LayerCase(LLAMA[0], 1024, rank) for rank in (2, 64)]
    return Size(tuple(cases))


FULL = _full()
QUICK = Size(
    tuple(LayerCase(shape, tokens, 8) for shape in BERT[:2] for tokens in (256, 2048)),
    precisions=("float32", "bfloat16"),
    seconds=0.8,
    rounds=(3, 9),
    step_seconds=5.0,
    layers=1,
    step_warmup=1,
    training_steps=12,
    events=1,
    modules=(10, 100),
    intervals=2,
    peaks=(),
)
SMOKE = Size(
    (LayerCase((24, 16), 8, 2), LayerCase((24, 16), 16, 2)),
    seconds=0.0,
    rounds=(2, 2),
    step_seconds=0.0,
    training_steps=4,
    events=1,
    width=24,
    layers=1,
    batch=2,
    tokens=4,
    rank=2,
    modules=(2, 3),
    module_width=8,
    intervals=2,
    large_bytes=1 << 16,
    peaks=(),
)


def _cuda() -> Size:
    cases = [LayerCase(shape, tokens, 8) for shape in (*BERT, LLAMA[2]) for tokens in (2048, 8192)]
    cases += [LayerCase(LLAMA[2], 8192, rank) for rank in (2, 64)]
    return Size(
        tuple(cases),
        precisions=("bfloat16", "bfloat16 throughout"),
        seconds=0.2,
        step_seconds=3.0,
        width=2048,
        layers=2,
        tokens=512,
        events=1,
        modules=(100,),
        intervals=2,
        peaks=("bfloat16",),
        device="cuda",
    )


CUDA = _cuda()

NAMED = {"full": FULL, "quick": QUICK, "smoke": SMOKE, "cuda": CUDA}
