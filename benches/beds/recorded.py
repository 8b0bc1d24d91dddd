"""A comparison as a file of results has it, whichever release and machine the runs are of."""

from __future__ import annotations

from collections.abc import Sequence

from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record

from .arms import SOURCE
from .kinds import KINDS
from .plan import TUNING, Comparison, Plan


def sizes(records: Sequence[Record], arms: Sequence[Method]) -> list[Recorded]:
    """The plan of each size of a bed that a file has, in the order of the file."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(repr(sorted(record["config"]["bed"].items())), []).append(record)
    return [Recorded(of_size, arms) for of_size in found.values()]


class Recorded(Plan):
    """The plan of runs that are there.

    Args:
        records: Of one bed, of one size.
        arms: Those to show, in this order.

    Raises:
        ValueError: an arm has no run.
    """

    def __init__(self, records: Sequence[Record], arms: Sequence[Method]) -> None:
        done = [
            record for record in records if record["status"] == "done" and record["config"]["arm"] != SOURCE
        ]
        configs = [record["config"] for record in done]
        for arm in arms:
            if not any(config["method"] == str(arm) for config in configs):
                raise ValueError(f"there is no run of {arm}.")
        kind = KINDS[configs[0]["task"]]
        sizes = {
            name: tuple(size) if isinstance(size, list) else size for name, size in configs[0]["bed"].items()
        }
        paired = [config["seed"] for config in configs if config["seed"] < TUNING]
        tuned = [config for config in configs if config["seed"] >= TUNING]
        comparison = Comparison(
            kind=configs[0]["task"],
            options=kind.options(**sizes),
            arms=list(arms),
            rs=sorted({config["r"] for config in configs if config["seed"] < TUNING}),
            lrs=sorted({config["lr"] for config in tuned or configs}),
            seeds=max(paired) + 1,
            tune_seeds=len({config["seed"] for config in tuned}) or 1,
            alpha=configs[0]["alpha"],
            warmup=configs[0]["warmup"],
            source_r=16,
        )
        super().__init__(comparison, lambda _: None)
        self._runs = {
            (c["method"], c["r"], c["lr"], c["seed"]): record for c, record in zip(configs, done, strict=True)
        }

    def found(self, arm: Method, r: float, lr: float, seed: int) -> Record | None:
        """The run of these, by name."""
        return self._runs.get((str(arm), r, lr, seed))
