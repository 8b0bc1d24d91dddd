"""The table of ranks and its heat map, from models and from saved adapters."""

import io
import re
import struct
import sys

import pytest
from increlora_rs import IncreLoraConfig, plot_ranks, rank_table
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
        config = IncreLoraConfig(**({"target_modules": targets, "r": 6} | kwargs))
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
    adapted = get_peft_model(model, IncreLoraConfig(target_modules=r".*experts\.\d"))
    grow(adapted, {f"layers.{k}.experts.{e}": 1 + k + 2 * e for k in range(2) for e in range(2)})
    table = rank_table(adapted)
    assert [table.ranks[str(k), kind] for k in range(2) for kind in sorted(table.kinds)] == [1, 3, 2, 4]


def test_kinds_of_the_same_ending_keep_what_tells_them_apart(make_bert, grow):
    model = get_peft_model(make_bert(), IncreLoraConfig(target_modules=r".*layer.*dense"))
    grow(model)
    assert sorted(rank_table(model).kinds) == ["attention.output.dense", "intermediate.dense", "output.dense"]


def test_layer_that_is_adapted_in_part_has_gaps(make_bert, grow):
    config = IncreLoraConfig(target_modules=r".*(layer\.0\.attention\.self\.(query|key)|layer\.1.*self\.key)")
    model = get_peft_model(make_bert(), config)
    grow(model)
    assert set(rank_table(model).ranks) == {("0", "query"), ("0", "key"), ("1", "key")}


def test_named_adapter_is_tabulated(build, grow):
    model = build(2)
    model.add_adapter("other", IncreLoraConfig(target_modules=["up"], r=4))
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
    adapted = get_peft_model(
        nn.ModuleDict({"layers": nn.ModuleList(layers)}), IncreLoraConfig(target_modules=names)
    )
    grow(adapted, {f"layers.0.{name}": 1 + k for k, name in enumerate(names)})
    ranks = list(range(1, kinds + 1))
    assert numbers(str(rank_table(adapted))) == [[0, *ranks, sum(ranks)]]


# The plot.


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("layers", [2, 67])
def test_plot_is_a_png_that_grows_with_the_layers(build, tmp_path, layers):
    plot_ranks(build(layers), tmp_path / "ranks.png")
    width, height = png_size(tmp_path / "ranks.png")
    assert 40 * layers < width < 900 + 90 * layers
    assert 200 < height < 1000


def test_plot_of_a_directory_is_that_of_its_model(build, tmp_path):
    model = build(3)
    model.save_pretrained(tmp_path / "adapter")
    plot_ranks(model, tmp_path / "model.png")
    plot_ranks(str(tmp_path / "adapter"), str(tmp_path / "directory.png"))
    assert (tmp_path / "model.png").read_bytes() == (tmp_path / "directory.png").read_bytes()


def test_plot_of_a_partly_adapted_model_is_drawn(build, tmp_path):
    plot_ranks(build(2, head=True), tmp_path / "ranks.png")
    assert min(png_size(tmp_path / "ranks.png")) > 200


def test_ending_gives_the_format(build, tmp_path):
    plot_ranks(build(2), tmp_path / "ranks.svg")
    assert "<svg" in (tmp_path / "ranks.svg").read_text()


def test_plot_without_matplotlib_says_what_to_install(build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .*increlora_rs\[plot\]"):
        plot_ranks(build(2), tmp_path / "ranks.png")


def test_plot_into_a_missing_directory_is_refused_by_path(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_ranks(build(2), tmp_path / "nowhere" / "ranks.png")


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

    model = get_peft_model(Two(), IncreLoraConfig(r=2, target_modules=["q"]))
    table = rank_table(model)
    assert table.total_rank == 4
    assert table.kinds == [f"{stack}.q" for stack in sorted(stacks)]
