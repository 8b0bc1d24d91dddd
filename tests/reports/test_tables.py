"""The tables of ranks and of modules, from models and from saved adapters."""

import io
import math
import re

import pytest
import torch
from growing import growing
from increlora_rs import module_table, rank_table
from increlora_rs.reports.tables import RankTable
from peft import get_peft_model
from rich.console import Console
from torch import nn

LAYERS = 12
# Kind as the table calls it, and the module's name within its block.
KINDS = {"query": "attention.query", "value": "attention.value", "up": "mlp.up"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 16)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(16, 16)})


def rank_of(layer, kind):
    return 1 + (5 * layer + list(KINDS).index(kind)) % 12


@pytest.fixture
def build(grow):
    """``build(layers)``: a model of blocks of three modules, and a head where asked, grown unequally."""

    def run(layers, head=False, **kwargs):
        model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(layers))})
        targets = ["query", "value", "up"]
        if head:
            model["head"] = nn.Linear(16, 16)
            targets.append("head")
        config = growing(**({"target_modules": targets, "r": 6} | kwargs))
        adapted = get_peft_model(model, config)
        names = [(k, kind, f"layers.{k}.{inner}") for k in range(layers) for kind, inner in KINDS.items()]
        ranks = {name: rank_of(k, kind) for k, kind, name in names}
        grow(adapted, ranks | ({"head": 9} if head else {}))
        return adapted

    return run


@pytest.fixture(params=["model", "directory"])
def source(request, build, tmp_path):
    """The grown model of 12 layers, in memory or saved."""
    model = build(LAYERS)
    if request.param == "model":
        return model
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def numbers(text):
    """The rows of a printed table that begin with a layer number, as lists of numbers."""
    rows = [re.findall(r"\d+", line) for line in text.splitlines() if re.match(r"\W+\d+\s*│", line)]
    return [[int(cell) for cell in row] for row in rows]


def rendered(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


# The table.


def test_rows_are_the_layers_in_natural_order(source):
    assert rank_table(source).layers == [str(k) for k in range(LAYERS)]


def test_columns_are_the_kinds_of_module(source):
    assert sorted(rank_table(source).kinds) == sorted(KINDS)


def test_ranks_stand_at_their_layer_and_kind(source):
    wanted = {(str(k), kind): rank_of(k, kind) for k in range(LAYERS) for kind in KINDS}
    assert rank_table(source).ranks == wanted


def test_total_rank_is_the_sum(source):
    assert rank_table(source).total_rank == sum(rank_of(k, kind) for k in range(LAYERS) for kind in KINDS)


def test_budget_is_the_average_times_the_modules(source):
    assert rank_table(source).budget == 6 * LAYERS * len(KINDS)


def test_module_outside_of_layers_gets_the_last_row(build):
    table = rank_table(build(2, head=True))
    assert table.layers == ["0", "1", "-"]
    assert table.ranks["-", "head"] == 9


def test_experts_are_kinds_of_their_layer(grow):
    layers = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    adapted = get_peft_model(model, growing(target_modules=r".*experts\.\d"))
    grow(adapted, {f"layers.{k}.experts.{e}": 1 + k + 2 * e for k in range(2) for e in range(2)})
    table = rank_table(adapted)
    assert [table.ranks[str(k), kind] for k in range(2) for kind in sorted(table.kinds)] == [1, 3, 2, 4]


def test_kinds_of_the_same_ending_keep_what_tells_them_apart(make_bert, grow):
    model = get_peft_model(make_bert(), growing(target_modules=r".*layer.*dense"))
    grow(model)
    assert sorted(rank_table(model).kinds) == ["attention.output.dense", "intermediate.dense", "output.dense"]


def test_layer_that_is_adapted_in_part_has_gaps(make_bert, grow):
    config = growing(target_modules=r".*(layer\.0\.attention\.self\.(query|key)|layer\.1.*self\.key)")
    model = get_peft_model(make_bert(), config)
    grow(model)
    assert set(rank_table(model).ranks) == {("0", "query"), ("0", "key"), ("1", "key")}


def test_named_adapter_is_tabulated(build, grow):
    model = build(2)
    model.add_adapter("other", growing(target_modules=["up"], r=4))
    grow(model, {"layers.0.mlp.up": 4, "layers.1.mlp.up": 3}, adapter_name="other")
    table = rank_table(model, "other")
    assert (table.ranks, table.budget) == ({("0", "up"): 4, ("1", "up"): 3}, 8)


@pytest.mark.parametrize("show", [str, rendered], ids=["str", "rich"])
def test_printed_rows_hold_ranks_and_their_sum(source, show):
    table = rank_table(source)
    wanted = []
    for k in range(LAYERS):
        ranks = [rank_of(k, kind) for kind in table.kinds]
        wanted.append([k, *ranks, sum(ranks)])
    assert numbers(show(table)) == wanted


@pytest.mark.parametrize("show", [str, rendered], ids=["str", "rich"])
def test_printed_table_names_kinds_total_and_budget(source, show):
    table = rank_table(source)
    text = show(table)
    wanted = [*KINDS, f"total {table.total_rank} of a budget of {table.budget}"]
    assert [part for part in wanted if part not in text] == []


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_string_holds_no_terminal_codes(build, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in str(rank_table(build(2)))


@pytest.mark.parametrize("kinds", [12, 40])
def test_wide_table_is_printed_with_all_its_ranks(grow, kinds):
    names = [f"a_rather_long_projection_{k:02}" for k in range(kinds)]
    layers = [nn.ModuleDict({name: nn.Linear(40, 40) for name in names})]
    adapted = get_peft_model(nn.ModuleDict({"layers": nn.ModuleList(layers)}), growing(target_modules=names))
    grow(adapted, {f"layers.0.{name}": 1 + k for k, name in enumerate(names)})
    ranks = list(range(1, kinds + 1))
    assert numbers(str(rank_table(adapted))) == [[0, *ranks, sum(ranks)]]


def test_more_kinds_than_a_line_can_hold_go_down(grow):
    names = [f"expert_{k:02}" for k in range(60)]
    layers = [nn.ModuleDict({name: nn.Linear(8, 8) for name in names}) for _ in range(2)]
    adapted = get_peft_model(nn.ModuleDict({"layers": nn.ModuleList(layers)}), growing(target_modules=names))
    grow(adapted, {f"layers.{n}.{name}": 1 + (k + n) % 7 for k, name in enumerate(names) for n in range(2)})
    lines = [line.split() for line in str(rank_table(adapted)).splitlines() if "expert_" in line]
    rows = {words[1]: [int(word) for word in words if word.isdigit()] for words in lines}
    firsts, seconds = [1 + k % 7 for k in range(60)], [1 + (k + 1) % 7 for k in range(60)]
    wanted = {name: [a, b, a + b] for name, a, b in zip(names, firsts, seconds, strict=True)}
    assert rows == wanted


def test_a_parameter_is_called_as_its_module():
    ranks = {f"layers.{k}.mlp.{name}": 1 for k in range(2) for name in ("gate.weight", "experts.down_proj.0")}
    assert RankTable.of(ranks, 4).kinds == ["gate.weight", "down_proj.0"]


# The modules.


def dense(model, name):
    return model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double().detach()


@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_norm_and_singular_values_are_those_of_the_dense_update(build, scaling):
    model = build(3, lora_alpha=5, scaling=scaling)
    table = module_table(model)
    assert len(table.rows) == 9
    for row in table.rows:
        update = dense(model, row.name)
        wanted = torch.linalg.svdvals(update)
        assert row.norm == pytest.approx(update.norm().item(), rel=1e-5)
        assert len(row.singular_values) == row.rank
        assert row.singular_values == pytest.approx(wanted[: row.rank].tolist(), rel=1e-4, abs=1e-6)
        assert wanted[row.rank :].abs().max() < 1e-5


def test_shape_is_out_by_in(make_plain, grow):
    model = get_peft_model(make_plain(), growing(target_modules=["lin0", "lin1"]))
    grow(model)
    assert {row.name: row.shape for row in module_table(model).rows} == {"lin0": (20, 12), "lin1": (6, 20)}


def test_module_rows_are_those_of_the_directory(build, tmp_path):
    model = build(2)
    model.save_pretrained(tmp_path / "adapter")
    assert module_table(tmp_path / "adapter") == module_table(model)


def test_update_of_a_fresh_adapter_is_0(make_plain):
    model = get_peft_model(make_plain(), growing(target_modules=["lin0"]))
    (row,) = module_table(model).rows
    assert (row.rank, row.norm, row.singular_values) == (1, 0.0, [0.0])


def cells(text):
    """The words of each printed line that begins with a module's name, by that name."""
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: words[1:] for words in lines if words and re.match(r"\d+\.", words[0])}


def test_printed_modules_have_shape_rank_share_norm_and_values(build):
    table = module_table(build(4))
    printed = cells(str(table))
    assert len(printed) == 12
    for row in table.rows:
        shape, rank, share, norm, *values = printed[row.name.removeprefix("layers.")]
        assert (shape, int(rank)) == ("16x16", row.rank)
        assert float(share.rstrip("%")) == pytest.approx(100 * row.rank / 72, abs=0.05)
        assert float(norm) == pytest.approx(row.norm, rel=0.01)
        many = row.rank > 4
        wanted = [*row.singular_values[:3], row.singular_values[-1]] if many else row.singular_values
        assert [float(v) for v in values if v != "…"] == pytest.approx(wanted, rel=0.06)
        assert ("…" in values) == many


def test_totals_are_printed(build):
    table = module_table(build(4))
    total = sum(rank_of(k, kind) for k in range(4) for kind in KINDS)
    norm = math.sqrt(sum(row.norm**2 for row in table.rows))
    last = [line.split() for line in str(table).splitlines() if "12 modules" in line]
    assert last == [["12", "modules", str(total), f"{100 * total / 72:.1f}%", f"{norm:.3g}"]]
    assert f"total {total} of a budget of 72" in str(table)
    assert "names go on from layers." in str(table)


def test_one_module_is_printed_under_its_own_name(make_plain):
    text = str(module_table(get_peft_model(make_plain(), growing(target_modules=["lin0"]))))
    assert "lin0" in text
    assert "names go on" not in text


@pytest.mark.parametrize("layers", [1, 34])
def test_modules_can_be_told_apart_in_80_columns(grow, layers):
    names = ["self_attention.query_key_value_projection", "block_sparse_mixture.down_projection"]
    blocks = [
        nn.ModuleDict({a: nn.ModuleDict({b: nn.Linear(300, 1100)}) for a, b in (n.split(".") for n in names)})
        for _ in range(layers)
    ]
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList(blocks)})})
    adapted = get_peft_model(model, growing(r=6, target_modules=[n.split(".")[1] for n in names]))
    grow(adapted, dict.fromkeys([row.name for row in module_table(adapted).rows], 6))
    out = io.StringIO()
    Console(file=out, width=80).print(module_table(adapted))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    # A name is folded, not cut: its pieces stand one below the other at the left.
    left = "".join(line[1:].split("  ")[0].strip() for line in lines)
    for layer in range(layers):
        for name in names:
            assert (f"{layer}.{name}" if layers > 1 else name.split(".")[1]) in left
    assert out.getvalue().count("1100x300") == 2 * layers


# Two stacks.


@pytest.mark.parametrize("stacks", [("encoder.block", "decoder.block"), ("vision.layers", "text.layers")])
def test_two_stacks_of_layers_each_have_their_columns(stacks):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            for stack in stacks:
                outer, inner = stack.split(".")
                layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))
                setattr(self, outer, nn.ModuleDict({inner: layers}))

        def forward(self, x):
            return x

    model = get_peft_model(Two(), growing(r=2, target_modules=["q"]))
    table = rank_table(model)
    assert table.total_rank == 4
    assert table.kinds == [f"{stack}.q" for stack in sorted(stacks)]
