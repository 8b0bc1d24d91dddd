"""What growing ranks cost between processes: bytes by formula, for models of 8 and 70 billion parameters.

    python -m benches.traffic

prints the tables of docs/distributed.md. The formulas say what one process gives to a collective of the
group; tests/training/test_traffic.py counts that in small trainings. In a ring, to which the tables add up, a
process sends what it gives to a sum ``2 (P - 1) / P`` times, P being the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benches.tables import Table

# Of importance="gradient": columns of the sketch beyond a growth's components, rows for each column.
_OVERSAMPLING, _ROWS_A_COLUMN = 7, 4
# Numbers that tell whether a tensor is the same in all processes, float64.
_FACTS = 5
# exp_avg and exp_avg_sq of Adam.
_MOMENTS = 2
# Bytes of a number of the base: bfloat16.
_BASE = 2


@dataclass(frozen=True)
class Adapter:
    """The adapter of a training.

    Args:
        sizes: (out, in) of each module.
        ranks: Components of each, now.
        room: Components that each has room for, in the capacity form.
        width: Bytes of a number that is trained.
    """

    sizes: Sequence[tuple[int, int]]
    ranks: Sequence[int]
    room: Sequence[int]
    width: int = 4

    @property
    def tensors(self) -> int:
        """A, B and E of each module."""
        return 3 * len(self.sizes)

    @property
    def trained(self) -> int:
        """Numbers that are trained: in + out + 1 a component."""
        return _numbers(self.sizes, self.ranks)

    @property
    def allocated(self) -> int:
        """Numbers that the capacity form has room for."""
        return _numbers(self.sizes, self.room)

    # At `attach`.

    def attach(self, engine: str) -> int:
        """A seed, whether there is a state, the modules' names; with FSDP2 the first process's values, in the
        capacity form the pieces made whole."""
        values = {
            "FSDP2": self.width * self.trained,
            "FSDP1": self._pieces(),
            "FSDP2, adapter sharded": self._pieces(),
        }
        return 8 + 16 + 16 + values.get(engine, 0)

    # In a step.

    def average(self) -> int:
        """The buffer of gradients that are averaged where the adapter is left out of FSDP2's sharding."""
        return self.width * (self.trained + self.tensors)

    def whole(self) -> int:
        """What FSDP and ZeRO keep in pieces made whole, and two facts."""
        return self._pieces() + 2 * 8

    def averaged(self) -> int:
        """An average in pieces made whole at a change of ranks, and a fact."""
        return self._pieces() // 4 + 8

    def begun_average(self) -> int:
        """``keep_average`` of one in pieces: it and the adapter made whole."""
        return self.averaged() + self._pieces() // 2

    def _pieces(self) -> int:
        """Four sums: values and gradients, before the step and after it."""
        return 4 * self.width * (self.allocated + self.tensors)

    def check(self) -> int:
        """Are parameters and gradients alike? In the first two steps, before a decision, and at powers of two
        where no DDP averages; not of pieces."""
        return 2 * 8 * _FACTS * self.tensors

    def sensitivities(self) -> int:
        """A step in the window of ``importance="sensitivity"``."""
        return 8 * len(self.sizes)

    def sketches(self, components: int) -> int:
        """A step in the window of ``importance="gradient"``, where a growth adds so many components to a
        module."""
        columns = _OVERSAMPLING + components
        rows = _ROWS_A_COLUMN * columns + 1
        return self.width * sum(columns * out + rows * features for out, features in self.sizes)

    # At a change of ranks.

    def choice(self) -> int:
        """Scores, and whom a gradient reached, where ranks grow; where they move nothing."""
        return (8 + 4) * len(self.sizes)

    def directions(self, grown: Sequence[int], components: int) -> int:
        """What the modules ``grown`` start from, float64, with ``importance="gradient"``."""
        return 8 * _numbers([self.sizes[k] for k in grown], [components] * len(grown))

    def moved_state(self, shrunk: Sequence[int]) -> int:
        """The optimizer's state of parameters of which rows went, where it is in pieces; ``shrunk``: the
        numbers that each has room for."""
        return _MOMENTS * self.width * (sum(shrunk) + len(shrunk))


def _numbers(sizes: Sequence[tuple[int, int]], components: Sequence[int]) -> int:
    return sum((out + features + 1) * each for (out, features), each in zip(sizes, components, strict=True))


def sent(given: float, processes: int) -> float:
    """What a process of a ring sends of a sum."""
    return 2 * (processes - 1) / processes * given


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama 3."""

    name: str
    hidden: int
    between: int
    layers: int
    keys: int = 1024
    words: int = 128256

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(out, in) of its linear layers, without the head."""
        hidden, between = self.hidden, self.between
        attention = [(hidden, hidden), (self.keys, hidden), (self.keys, hidden), (hidden, hidden)]
        return [*attention, (between, hidden), (between, hidden), (hidden, between)] * self.layers

    @property
    def parameters(self) -> int:
        """Weights in all: linear layers, embedding, head, norms."""
        linear = sum(out * features for out, features in self.sizes)
        return linear + 2 * self.words * self.hidden + (2 * self.layers + 1) * self.hidden

    def adapter(self) -> Adapter:
        """r=8 on all linear layers, max_r=16."""
        count = len(self.sizes)
        return Adapter(self.sizes, [8] * count, [16] * count)


MODELS = (Llama("8 B", 4096, 14336, 32), Llama("70 B", 8192, 28672, 80))
PROCESSES = (8, 64, 256, 1024)


def steps() -> Table:
    """What a process sends in a step, and at a change of ranks."""
    header = "model, processes; base, gathered twice; gradients; capacity form; check; sketches; growth"
    table = Table("Sent by a process", header.split("; "))
    for model in MODELS:
        adapter, some = model.adapter(), range(0, len(model.sizes), 10)
        # What is broadcast is passed on once.
        growth = size(adapter.choice() + adapter.directions(some, 1))
        for processes in PROCESSES:
            sums = (adapter.average(), adapter.whole(), adapter.check(), adapter.sketches(1))
            table.add(
                f"{model.name}, {processes:,}",
                size(2 * _BASE * model.parameters * (processes - 1) / processes),
                *(size(sent(each, processes)) for each in sums),
                growth,
            )
    return table


def holdings() -> Table:
    """What a process holds between steps."""
    table = Table(
        "Held by a process",
        ["model, processes", "base, whole", "base, a piece", "adapter and state, whole", "capacity form"],
    )
    for model in MODELS:
        adapter = model.adapter()
        for processes in PROCESSES:
            # A value, two moments; and the values that decide, which are whole in each.
            kept = (1 + _MOMENTS) * adapter.width
            capacity = kept * adapter.allocated / processes + adapter.width * adapter.trained
            table.add(
                f"{model.name}, {processes:,}",
                size(_BASE * model.parameters),
                size(_BASE * model.parameters / processes),
                size(kept * adapter.trained),
                size(capacity),
            )
    return table


def size(count: float) -> str:
    """Bytes, with a unit."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            value = count / least
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def rendered(table: Table) -> str:
    """Its rows in Markdown, without a heading."""
    return table.markdown().partition("\n\n")[2]


if __name__ == "__main__":
    print("\n".join(map(rendered, (steps(), holdings()))))
