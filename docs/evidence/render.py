"""Writes the tables of ``docs/evidence.md``, and its charts, from the results beside this file; with
``--check`` only tells whether the tables are up to date.

A table stands between ``<!-- overview METHODS TASKS -->`` or ``<!-- tasks METHODS TASKS -->`` and
``<!-- end -->``, the number of runs between ``<!-- runs -->`` and it. METHODS are as for
``increlora-rs compare``; TASKS names with commas, none for all. A method at budget R beside LoRA at budget L
stands behind ``<!-- fewer METHOD TASKS R,L -->``. That of a bed stands behind
``<!-- bed ARMS FILE R -->``, ARMS as for ``python -m benches.beds``, FILE beside this one, without its
ending, R a budget; that of several budgets behind ``<!-- curve ARMS FILE -->``, that of several sizes of a
bed behind ``<!-- sizes ARMS FILE OPTIONS -->``, OPTIONS those that tell the sizes apart; that of another
comparison behind ``<!-- file METHODS FILE -->``.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from pathlib import Path

from increlora_rs.compare.charts import draw_costs, draw_mean_ranks, draw_overview
from increlora_rs.compare.methods import Method, parse_methods
from increlora_rs.compare.overview import Overview
from increlora_rs.compare.results import Record, read_results
from increlora_rs.compare.summary import Comparison, difference_of, markdown_table, summarise

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from benches.beds.arms import CEILING, REFERENCE, names  # noqa: E402
from benches.beds.curve import draw  # noqa: E402
from benches.beds.overview import by_budget, by_size  # noqa: E402
from benches.beds.recorded import Recorded, sizes  # noqa: E402
from benches.beds.report import ceiling_note, tables  # noqa: E402

PAGE = HERE.parent / "evidence.md"
RESULTS = HERE / "minilm.jsonl"

_BLOCK = re.compile(
    r"<!-- (?P<kind>overview|tasks|fewer|runs|bed|curve|sizes|file)"
    r"(?: (?P<methods>\S+))?(?: (?P<tasks>\S+))?(?: (?P<more>\S+))? -->\n"
    r".*?<!-- end -->\n",
    re.DOTALL,
)
# The chart of parameters has these methods (a seed of rslora that did not learn would stretch its scale),
# that of ranks those that grow, on one task.
_COMPARED = "lora,adalora,paper,increlora,increlora:importance=gradient"
_GROWN = "increlora:importance=gradient,increlora:growth_end=0.6,importance=sensitivity"
_GROWN_ON = "STS-B"


# Every table is of the same runs.
_runs = functools.cache(lambda: read_results(RESULTS))
_comparisons = functools.cache(lambda: {c.task: c for c in summarise(_runs())})


def rendered(page: str) -> str:
    """The page with every table as the results have it."""
    return _BLOCK.sub(_block, page)


def selected(methods: str, tasks: str | None) -> list[Comparison]:
    """The comparisons of the named methods, in that order, on the named tasks or all.

    Raises:
        ValueError: a method or a task has no results.
    """
    names = [str(method) for method in parse_methods(methods)]
    comparisons = _comparisons()
    wanted = list(comparisons) if tasks is None else tasks.split(",")
    if missing := set(wanted) - comparisons.keys():
        raise ValueError(
            f"{RESULTS} has no task {', '.join(sorted(missing))}; it has {', '.join(comparisons)}."
        )
    chosen = []
    for task in wanted:
        rows = [row for row in comparisons[task].rows if row.method in names]
        rows.sort(key=lambda row: (row.r, names.index(row.method)))
        chosen.append(Comparison(task, comparisons[task].setting, rows))
    if missing := set(names) - {row.method for c in chosen for row in c.rows}:
        raise ValueError(f"{RESULTS} has no run of {', '.join(sorted(missing))} on {', '.join(wanted)}.")
    return [c for c in chosen if c.rows]


def _block(block: re.Match[str]) -> str:
    first = block[0].split("\n", 1)[0]
    # Without the empty lines Markdown takes the table for a part of the comment.
    return f"{first}\n\n{_text(block)}\n\n<!-- end -->\n"


def _text(block: re.Match[str]) -> str:
    if block["kind"] == "runs":
        hours = sum(run["seconds"] for run in _runs()) / 3600
        return f"{len(_runs())} runs, {hours:.1f} hours of one core, pauses of the machine included."
    if block["kind"] in _BEDS:
        return _BEDS[block["kind"]](*bed(block["methods"], block["tasks"]), block["more"])
    if block["kind"] == "file":
        return "\n\n".join(_table(*c.cells()) for c in summarise(recorded(block["methods"], block["tasks"])))
    if block["kind"] == "fewer":
        return fewer(block["methods"], block["tasks"], *map(float, block["more"].split(",")))
    comparisons = selected(block["methods"], block["tasks"])
    if block["kind"] == "overview":
        return _table(*Overview(comparisons).cells())
    return "\n\n".join(f"### {c.title}\n\n{_table(*c.cells())}" for c in comparisons)


def fewer(method: str, tasks: str, r: float, r_of_lora: float) -> str:
    """The table of a method at one budget beside LoRA at another, a row a task."""
    rows = []
    for comparison in selected(",".join(dict.fromkeys(("lora", method))), tasks):
        found = {(row.method, row.r): row for row in comparison.rows}
        lora, ours = found["lora", r_of_lora], found[method, r]
        differences = [difference_of(lora, ours, part) for part in ("dev", "test")]
        rows.append(
            [
                comparison.task,
                *[f"{row.mean('parameters', 'adapter'):,.0f}" for row in (lora, ours)],
                *[row.score.text() for row in (lora, ours)],
                *["" if spread is None else spread.text() for spread in differences],
            ]
        )
    names = f"LoRA, r = {r_of_lora:g}", f"r = {r:g}"
    header = ["task", *(f"numbers, {name}" for name in names), *names, "difference", "on the test set"]
    return markdown_table(header, rows)


def recorded(methods: str, file: str) -> list[Record]:
    """The runs of the named methods that a file beside this one holds, in that order.

    Raises:
        ValueError: it has none of a method.
    """
    runs = read_results(HERE / f"{file}.jsonl")
    found = []
    for method in map(str, parse_methods(methods)):
        of_method = [run for run in runs if run["config"]["method"] == method]
        if not of_method:
            raise ValueError(f"{file}.jsonl has no run of {method}.")
        found += of_method
    return found


def bed(arms: str, file: str) -> tuple[list[Record], list[Method]]:
    """The runs of a bed, and the named arms."""
    return read_results(HERE / f"{file}.jsonl"), parse_methods(arms, names())


def _at_budget(records: list[Record], arms: list[Method], r: str) -> str:
    """The table at a budget, and what the ceiling there says of the bed."""
    plan = Recorded([record for record in records if record["config"]["r"] == float(r)], arms)
    (table,) = tables(plan)
    of = {arm.name: plan.paired(arm, float(r)) for arm in arms}
    note = ceiling_note(plan.comparison.figure, of.get(CEILING, {}), of.get(REFERENCE, {}))
    return "\n\n".join([_table(table.header, table.rows), *note])


def _by_budget(records: list[Record], arms: list[Method], _: str | None) -> str:
    table = by_budget(Recorded(records, arms))
    return _table(table.header, table.rows)


def _by_size(records: list[Record], arms: list[Method], options: str) -> str:
    table = by_size(sizes(records, arms), options.split(","))
    return markdown_table(table.header, [[row[0], f"`{row[1]}`", *row[2:]] for row in table.rows])


_BEDS = {"bed": _at_budget, "curve": _by_budget, "sizes": _by_size}


def _table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table(header, [[f"`{row[0]}`", *row[1:]] for row in rows])


def _draw() -> None:
    draw_overview(Overview(selected(_COMPARED, None))).savefig(HERE / "parameters.png", bbox_inches="tight")
    (grown,) = selected(_GROWN, _GROWN_ON)
    draw_mean_ranks(grown, grown.rows).savefig(HERE / "ranks.png", bbox_inches="tight")
    draw(Recorded(*bed("lora,increlora", "planted")), HERE / "planted.png")
    (eight,) = summarise(recorded("all", "eight"))
    draw_costs(eight).savefig(HERE / "eight.png", bbox_inches="tight")


def main() -> int:
    """The command; 1 where ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a table is not up to date"
    )
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    current = rendered(page)
    if options.check:
        return int(page != current)
    PAGE.write_text(current, encoding="utf-8")
    _draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
