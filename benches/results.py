"""From the raw figures to tables and charts: ``RESULTS.md`` and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import charts, floor
from .bars import bars, whole_step
from .blocks import PAIRS
from .depth import DENSE, LORTA, PRILORA
from .floor import ELEMENT, Rates
from .host import LAYERS, RANK, TOKENS, WIDTH
from .memory import adapters_bytes
from .methods import ADALORA, FROZEN, LITERAL, LORA, METHODS, OUR_ADALORA, OURS
from .nothing import EMPTY, UPPER
from .scheduler import STATES
from .sizes import NAMED, Size
from .step import ARMED, SPENT, UNARMED
from .tables import Table, number
from .timing import QUIET, median, overhead, ratio, spread
from .training import added_memory, least

Figures = Mapping[str, Any]
_ADAPTED = tuple(method for method in METHODS if method != FROZEN)
_ADDED = tuple(f"+ {method}" for method in _ADAPTED)
_MB = 1e6


def tables(figures: Figures) -> list[Table]:
    """A table for each section that was measured, the bars first."""
    found = [_bars(figures)]
    if "step" in figures:
        found += [_passes(figures), _steps(figures)]
    if "training" in figures:
        found += _training(figures["training"], NAMED[figures["size"]])
    if "memory" in figures:
        found += [_saved(figures), _peak(figures)]
    if "scheduler" in figures:
        found.append(_scheduler(figures))
    if "layer" in figures:
        found.append(_layer(figures))
    if "depth" in figures:
        found += _depth(figures["depth"])
    if "blocks" in figures:
        found.append(_blocks(figures["blocks"]))
    if "nothing" in figures:
        found += _nothing(figures["nothing"])
    if "host" in figures:
        found.append(_host(figures["host"]))
    return [table for table in found if table.rows]


def write(figures: Figures, folder: Path) -> list[Path]:
    """Writes ``RESULTS.md`` and the charts; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = charts.draw(figures, folder)
    text = "\n".join(
        ["# Benchmark results", "", *conditions(figures), ""]
        + [f"![{caption}]({path.name})\n" for caption, path in drawn.items()]
        + [table.markdown() for table in tables(figures)]
    )
    report = folder / "RESULTS.md"
    report.write_text(text, encoding="utf-8")
    return [report, *drawn.values()]


def conditions(figures: Figures) -> list[str]:
    """On what the run was made, how, and whether the machine was quiet."""
    machine, rates = figures["machine"], Rates.from_json(figures["floor"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['capability']}{', AMX bf16' if machine['bf16_units'] else ''}; "
        f"{machine['threads']} threads; {machine['date']}",
        *([f"- everything on the GPU: {machine['gpu']}"] if machine.get("gpu") else []),
        f"- {machine['system']}, Python {machine['python']}, {versions}",
        f"- measured rates: matrix product {rates.gemm[4] / 1e9:.0f} GFLOP/s float32, "
        f"{rates.gemm[2] / 1e9:.0f} bfloat16; copy {rates.copy / 1e9:.1f} GB/s",
        f"- size of the run: {figures['size']}; medians over interleaved rounds; ratios are medians of the "
        "rounds' ratios; ± is the interquartile range over the median",
    ]
    shares = {name: share for name, share in figures["others"].items() if share is not None}
    loud = [f"{name} {share:.0%}" for name, share in shares.items() if share > QUIET]
    if loud:
        lines.append(
            f"- **the machine was not quiet**: others took of its time during {', '.join(loud)}; "
            "do not take these figures as final"
        )
    elif shares:
        lines.append(f"- others took at most {max(shares.values()):.1%} of the machine's time")
    return lines


def _bars(figures: Figures) -> Table:
    table = Table("Bars", ["promise", "measured", "bar", "kept", "note"])
    for bar in bars(figures):
        limit = f"{'at most' if bar.at_most else 'at least'} {bar.limit:g}"
        table.add(bar.promise, bar.value, limit, "yes" if bar.passed else "**no**", bar.note)
    return table


def _with_spread(values: list[float]) -> str:
    middle = number(median(values))
    return f"{middle} ±{spread(values):.0%}" if len(values) > 1 else middle


def _passes(figures: Figures) -> Table:
    size, rates = NAMED[figures["size"]], Rates.from_json(figures["floor"])
    table = Table(
        "Forward and backward of the model",
        [
            "precision",
            "dropout",
            "frozen ms",
            *_ADDED,
            "ours / LoRA",
            "floor ms",
            "GFLOP",
            "MB",
            "ours / floor",
        ],
        f"{size.layers} BERT blocks of width {size.width}, {size.batch} x {size.tokens} tokens, rank "
        f"{size.rank}, six adapted layers a block. Columns with + are milliseconds over the frozen model; "
        "the floor is what the adapters' arithmetic and traffic take at the measured rates.",
    )
    for record in figures["step"]["passes"]:
        samples, element = record["ms"], ELEMENT[record["precision"]]
        works = [
            floor.adapter(shape, size.batch * size.tokens, size.rank, record["dropout"], element)
            for shape in floor.layers_of_step(size)
        ]
        least = sum(rates.milliseconds(work, element) for work in works)
        over = {method: overhead(samples, method) for method in _ADAPTED}
        table.add(
            record["precision"],
            f"{record['dropout']:g}",
            _with_spread(samples[FROZEN]),
            *over.values(),
            over[OURS] / over[LORA],
            least,
            sum(work.flops for work in works) / 1e9,
            sum(work.bytes for work in works) / _MB,
            over[OURS] / least,
        )
    return table


def _steps(figures: Figures) -> Table:
    others, places = (LORA, ADALORA, LITERAL), (UNARMED, ARMED)
    table = Table(
        "Whole training step",
        [
            "precision",
            *others,
            f"{OURS}, mean",
            *places,
            "growth",
            SPENT,
            "/ LoRA",
            "/ AdaLoRA",
            "literal /",
            OUR_ADALORA,
            "/ PEFT's",
        ],
        "Milliseconds of zero_grad, forward, backward, AdamW and all that the method does besides. Ours in "
        "the paper's form with regulariser, reserve and newborn rows: the mean over an interval of the steps "
        "before the importance window (unarmed), in it (armed), and the growth. Budget spent: in the default "
        "form. Both AdaLoRAs between two mask events.",
    )
    for record in figures["step"]["steps"]:
        samples = whole_step(record)
        table.add(
            f"{record['precision']}, dropout {record['dropout']:g}",
            *(_with_spread(samples[name]) for name in (*others, OURS, *places)),
            _with_spread(record["event_ms"]),
            _with_spread(samples[SPENT]),
            ratio(samples, OURS, LORA),
            ratio(samples, OURS, ADALORA),
            ratio(samples, LITERAL, OURS),
            _with_spread(samples[OUR_ADALORA]) if OUR_ADALORA in samples else "",
            ratio(samples, OUR_ADALORA, ADALORA) if OUR_ADALORA in samples else "",
        )
    return table


def _saved(figures: Figures) -> Table:
    table = Table(
        "Saved for the backward pass by the adapters",
        ["what", "precision", "dropout", *(f"{method} MB" for method in _ADAPTED), "floor MB", "ours / LoRA"],
        "Storages counted once; parameters and what the frozen layers save left out.",
    )
    for record in figures["memory"]["layer"] + figures["memory"]["model"]:
        if "shape" in record:
            features, out = record["shape"]
            shared = "" if record["layers"] == 1 else f"{record['layers']} on one input: "
            what = f"{shared}{features} to {out}, {record['tokens']} tokens, r {record['rank']}"
        else:
            what = "the model"
        saved = {method: adapters_bytes(record["bytes"], method) for method in _ADAPTED}
        table.add(
            what,
            record["precision"],
            f"{record['dropout']:g}",
            *(value / _MB for value in saved.values()),
            record["floor"] / _MB if "floor" in record else "",
            saved[OURS] / saved[LORA],
        )
    return table


def _peak(figures: Figures) -> Table:
    table = Table(
        "Peak memory of a process that trains the model",
        ["method", "precision", "dropout", "model built MB", "peak MB", "training adds MB"],
    )
    for record in figures["memory"]["peak"]:
        built, highest = record["built"] / _MB, record["peak"] / _MB
        dropout = f"{record['dropout']:g}"
        table.add(record["method"], record["precision"], dropout, built, highest, highest - built)
    return table


def _scheduler(figures: Figures) -> Table:
    table = Table(
        "Scheduler",
        ["modules", "form", "plain step ms", *(f"+ {state}" for state in STATES)],
        "Milliseconds of processor time that the hooks take in optimizer.step() of AdamW (foreach off, as "
        "torch has it on the CPU), a growth of a tenth of the modules included in the last column. In the "
        "default form ranks move: its steps are all alike, and the last column has events that move some.",
    )
    for record in figures["scheduler"]:
        added = [median(took) if (took := record["hooks"][state]) else "" for state in STATES]
        table.add(record["modules"], record["form"], median(record["plain"]), *added)
    return table


def _training(figures: Figures, size: Size) -> list[Table]:
    rates = Rates.from_json(figures["floor"])
    of_steps = Table(
        "Whole training in the default form",
        ["precision", "dropout", FROZEN, LORA, OURS, "/ LoRA", "+ LoRA", "+ ours", "floor", "ours / floor"],
        "Milliseconds of processor time of a step, the mean of all of a training, with forward, backward, "
        "AdamW and the scheduler, whose events come as close to one another as its schedule for so few steps "
        "allows. Columns with + are over the frozen model; the floor is what the adapters' arithmetic and "
        "traffic take at rates that were measured in processor time, too.",
    )
    for record in figures["steps"]:
        samples = record["ms"]
        means = {name: sum(values) / len(values) for name, values in samples.items()}
        floor_ms = least(size, rates, record["precision"], record["dropout"])
        over = {name: overhead(samples, name) for name in (LORA, OURS)}
        of_steps.add(
            record["precision"],
            f"{record['dropout']:g}",
            *means.values(),
            means[OURS] / means[LORA],
            *over.values(),
            floor_ms,
            over[OURS] / floor_ms,
        )
    of_memory = Table(
        "Memory that such a training adds to the frozen model's peak",
        ["precision", "dropout", f"{LORA} MB", f"{OURS} MB", "ours / LoRA"],
        "Of new processes, a training each, with AdamW's state.",
    )
    for (precision, dropout), adds in added_memory(figures["peak"]).items():
        both = adds[LORA] / _MB, adds[OURS] / _MB
        of_memory.add(precision, f"{dropout:g}", *both, both[1] / both[0])
    return [of_steps, of_memory]


def _nothing(figures: Figures) -> list[Table]:
    of_layers = Table(
        "Adapted layer without components, forward and backward",
        ["in, out", "tokens", "precision", "frozen ms", "without components", "ratio"],
        "Processor time; the input wants its gradient.",
    )
    for record in figures["layers"]:
        samples, shape = record["ms"], ", ".join(map(str, record["shape"]))
        both = (median(samples[FROZEN]), median(samples[EMPTY]), ratio(samples, EMPTY, FROZEN))
        of_layers.add(shape, record["tokens"], record["precision"], *both)
    of_steps = Table(
        "Whole training step with all components in the upper third of the blocks",
        ["precision", "dropout", LORA, UPPER, "ratio"],
        "Milliseconds of processor time of forward, backward and AdamW, the default form attached; PEFT's "
        "LoRA has as many components, spread over all layers. Nothing below the first of them is trained.",
    )
    for record in figures["steps"]:
        samples = record["ms"]
        both = (median(samples[LORA]), median(samples[UPPER]), ratio(samples, UPPER, LORA))
        of_steps.add(record["precision"], record["dropout"], *both)
    return [of_layers, of_steps]


def _depth(figures: Figures) -> list[Table]:
    passes, steps = figures["passes"], figures["steps"]
    of_passes = Table(
        "Projections of attention, forward and backward",
        ["precision", "dropout", *passes[0]["ms"], "LoRTA / built", "LoRTA / LoRA"],
        "Milliseconds of query, key, value and output of all layers, without all that is between them.",
    )
    of_steps = Table(
        "Whole training step with ranks that rise",
        ["precision", "dropout", *steps[0]["ms"], "PRILoRA / LoRA"],
        "Milliseconds of forward, backward and AdamW, LoRA with the same ranks; pruning is one step of 40.",
    )
    for table, records, pairs in (
        (of_passes, passes, ((LORTA, DENSE), (LORTA, LORA))),
        (of_steps, steps, ((PRILORA, LORA),)),
    ):
        for record in records:
            samples = record["ms"]
            table.add(
                record["precision"],
                f"{record['dropout']:g}",
                *map(_with_spread, samples.values()),
                *(ratio(samples, *pair) for pair in pairs),
            )
    return [of_passes, of_steps]


def _blocks(records: list[dict[str, Any]]) -> Table:
    table = Table(
        "Linear layers of a block with MELoRA and MoRA",
        ["precision", "dropout", "method", "ms", "added / LoRA's", "added / as published", "layers / LoRA's"],
        "Forward and backward; what is added is beyond the frozen layers. LoRA has as many parameters.",
    )
    for record in records:
        samples = record["ms"]
        for name in (FROZEN, LORA, *PAIRS):
            added = [name, *([LORA] if name != FROZEN else []), *([PAIRS[name]] if name in PAIRS else [])]
            ratios = [overhead(samples, name) / overhead(samples, other) for other in added[1:]]
            table.add(
                record["precision"],
                f"{record['dropout']:g}",
                name,
                _with_spread(samples[name]),
                *[*ratios, *["-"] * (2 - len(ratios))],
                ratio(samples, name, LORA),
            )
    return table


def _host(records: list[dict[str, Any]]) -> Table:
    added = [f"+ {method}" for method in (LORA, OURS)]
    table = Table(
        "Small layers: what the process takes",
        ["precision", "dropout", "frozen", *added, "ours / LoRA"],
        f"Microseconds a layer of the process's own time, one thread, forward and backward of {LAYERS} "
        f"layers of {WIDTH} x {WIDTH} in a row, {TOKENS} tokens, rank {RANK}. Columns with + are over the "
        "frozen layers.",
    )
    for record in records:
        samples = record["ms"]
        over = {method: overhead(samples, method) for method in (LORA, OURS)}
        micro = (median(samples[FROZEN]), *over.values())
        values = [value * 1e3 / LAYERS for value in micro]
        table.add(record["precision"], f"{record['dropout']:g}", *values, over[OURS] / over[LORA])
    return table


def _layer(figures: Figures) -> Table:
    rates = Rates.from_json(figures["floor"])
    case = ("in, out", "tokens", "r", "precision", "dropout")
    distances = ("ours / floor", "frozen / its floor")
    table = Table(
        "Adapted layer, forward and backward",
        [*case, "frozen ms", *_ADDED, "ours / LoRA", "± ours", "floor ms", "MFLOP", "MB", *distances],
        "Columns with + are milliseconds over the frozen layer; ours / LoRA is of the whole layer's time.",
    )
    for record in figures["layer"]:
        samples, shape, tokens = record["ms"], tuple(record["shape"]), record["tokens"]
        element = ELEMENT[record["precision"]]
        work = floor.adapter(shape, tokens, record["rank"], record["dropout"], element)
        least = rates.milliseconds(work, element)
        base = rates.milliseconds(floor.frozen(shape, tokens), element)
        table.add(
            f"{shape[0]}, {shape[1]}",
            tokens,
            record["rank"],
            record["precision"],
            f"{record['dropout']:g}",
            median(samples[FROZEN]),
            *(overhead(samples, method) if method in samples else "" for method in _ADAPTED),
            ratio(samples, OURS, LORA),
            f"{spread(samples[OURS]):.0%}",
            least,
            work.flops / 1e6,
            work.bytes / _MB,
            overhead(samples, OURS) / least,
            median(samples[FROZEN]) / base,
        )
    return table
