"""The pictures: what stands where in them, and that they stay readable from one module to hundreds."""

import math
import struct
import sys

import numpy as np
import peft
import pytest
from growing import growing
from increlora_rs import GrowthHistory, plot_growth, plot_ranks, plot_scores, rank_table
from increlora_rs.reports.plots import draw_growth, draw_ranks, draw_scores
from increlora_rs.reports.tables import RankTable

KINDS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
KINDS += ["intermediate.dense", "output.dense"]


def modules(layers, kinds=KINDS):
    return [f"bert.encoder.layer.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def history(layers, kinds=KINDS, growths=10, step=400):
    """A training that grows a quarter of the modules by one at each growth, 20 steps apart from step 40."""
    names = modules(layers, kinds)
    generator = np.random.default_rng(0)
    grown = GrowthHistory(names, 0, [1] * len(names))
    ranks = np.ones(len(names), dtype=int)
    for n in range(growths):
        scores = 10.0 ** generator.uniform(-7, -3, len(names)) / (n + 1)
        ranks[np.argsort(-scores)[: max(1, len(names) // 4)]] += 1
        grown.add(40 + 20 * n, ranks.tolist(), scores.tolist())
    grown.budget, grown.step = int(ranks.sum()), step
    return grown


def heat_map(figure):
    """Axes and values of the figure's heat map."""
    axes = next(axes for axes in figure.axes if axes.collections and axes.get_xlabel())
    return axes, axes.collections[0]


def extents(figure, texts):
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def overlapping(boxes):
    """Pairs of boxes that share more than a pixel."""
    return [
        (n, m)
        for n, a in enumerate(boxes)
        for m, b in enumerate(boxes[:n])
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def drawn(figure):
    """The figure with its layout settled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


# Ranks by layer and kind.


@pytest.mark.parametrize("layers", [1, 12, 34, 120])
def test_ranks_stand_at_layer_and_kind(layers):
    ranks = {name: 1 + n % 9 for n, name in enumerate(modules(layers))}
    table = RankTable.of(ranks, 3 * len(ranks))
    axes = draw_ranks(table).axes[0]
    grid = axes.images[0].get_array()
    assert grid.shape == (6, layers)
    for (layer, kind), rank in table.ranks.items():
        assert grid[table.kinds.index(kind), table.layers.index(layer)] == rank


def test_cells_carry_their_rank():
    table = RankTable.of({name: 1 + n for n, name in enumerate(modules(12))}, 100)
    axes = draw_ranks(table).axes[0]
    shown = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert shown == {
        (table.layers.index(layer), table.kinds.index(kind)): str(rank)
        for (layer, kind), rank in table.ranks.items()
    }


def test_module_that_is_not_adapted_is_an_empty_cell():
    ranks = dict.fromkeys(modules(3), 2)
    del ranks["bert.encoder.layer.1.output.dense"]
    figure = draw_ranks(RankTable.of(ranks, 60))
    grid = figure.axes[0].images[0].get_array()
    assert np.isnan(np.ma.filled(grid, math.nan)).sum() == 1
    assert len(figure.axes[0].texts) == 17


@pytest.mark.parametrize("ranks", [[1], [1, 1], [1, 2], [7, 7], [3, 64]])
def test_colour_bar_has_whole_numbers(ranks):
    names = modules(len(ranks), KINDS[:1])
    figure = draw_ranks(RankTable.of(dict(zip(names, ranks, strict=True)), 9))
    drawn(figure)
    ticks = figure.axes[1].get_yticks()
    assert len(ticks) >= 2
    assert all(float(tick).is_integer() for tick in ticks)


SIZES = [(1, KINDS), (2, KINDS), (12, KINDS), (34, KINDS), (120, KINDS), (12, KINDS[:1])]
SIZES.append((2, [f"mlp.experts.{k}.{name}" for k in range(64) for name in ("up_proj", "down_proj")]))
SIZES.append((3, [f"a_module_with_a_very_long_name_indeed.{name}.projection" for name in "abcdef"]))
IDS = [f"{layers} layers of {len(kinds)}" for layers, kinds in SIZES]


@pytest.mark.parametrize(("layers", "kinds"), SIZES, ids=IDS)
def test_labels_of_the_ranks_do_not_overlap(layers, kinds):
    table = RankTable.of({name: 10 + n % 90 for n, name in enumerate(modules(layers, kinds))}, 9)
    figure = drawn(draw_ranks(table))
    axes = figure.axes[0]
    for texts in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
        assert overlapping(extents(figure, texts)) == []
    assert max(figure.get_size_inches()) < 32


# Growth and scores.


@pytest.mark.parametrize("draw", [draw_growth, draw_scores])
@pytest.mark.parametrize(("layers", "kinds"), SIZES, ids=IDS)
def test_labels_of_growth_and_scores_do_not_overlap(draw, layers, kinds):
    figure = drawn(draw(history(layers, kinds)))
    axes, _ = heat_map(figure)
    for texts in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
        assert overlapping(extents(figure, texts)) == []
    assert overlapping(extents(figure, [*axes.get_yticklabels(), *axes.texts])) == []
    assert max(figure.get_size_inches()) < 20


@pytest.mark.parametrize("draw", [draw_growth, draw_scores])
def test_every_kind_is_named_beside_its_rows(draw):
    axes, _ = heat_map(drawn(draw(history(34))))
    named = {text.get_text(): text.xy[1] for text in axes.texts}
    short = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert named == {kind: 34 * n + 16.5 for n, kind in enumerate(short)}


@pytest.mark.parametrize("draw", [draw_growth, draw_scores])
def test_rows_of_a_kind_are_its_layers(draw):
    axes, _ = heat_map(drawn(draw(history(5))))
    labels = {
        round(tick): text.get_text()
        for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert labels == {row: str(row % 5) for row in range(30)}


def test_growth_shows_each_modules_rank_between_the_growths():
    grown = history(3)
    axes, mesh = heat_map(draw_growth(grown))
    values = mesh.get_array()
    assert values.shape == (18, 11)
    for row in range(18):
        kind, layer = divmod(row, 3)
        k = grown.modules.index(f"bert.encoder.layer.{layer}.{KINDS[kind]}")
        assert values[row].tolist() == [1, *(ranks[k] for ranks in grown.ranks)]
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, *grown.steps, 400]
    assert axes.get_xlabel() == "optimizer step"


def test_growth_shows_total_and_budget():
    grown = history(3)
    total = next(axes for axes in draw_growth(grown).axes if axes.get_ylabel() == "total rank")
    stairs = total.patches[0].get_data()
    assert stairs.values.tolist() == [18, *(sum(ranks) for ranks in grown.ranks)]
    assert stairs.edges.tolist() == [0, *grown.steps, 400]
    assert set(total.lines[0].get_ydata()) == {grown.budget}
    assert total.get_title() == f"growth of the ranks, total {grown.budget} of {grown.budget}"


def test_history_that_ends_at_a_growth_shows_its_outcome():
    grown = history(2, growths=3, step=80)
    _, mesh = heat_map(draw_growth(grown))
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 40, 60, 80, 81]


def test_scores_stand_at_their_growth_and_module():
    grown = history(3)
    _, mesh = heat_map(draw_scores(grown))
    values = mesh.get_array()
    assert values.shape == (18, 10)
    for row in range(18):
        kind, layer = divmod(row, 3)
        k = grown.modules.index(f"bert.encoder.layer.{layer}.{KINDS[kind]}")
        assert values[row].tolist() == [scores[k] for scores in grown.scores]


def test_dots_mark_the_modules_that_grew():
    grown = history(3)
    axes, mesh = heat_map(draw_scores(grown))
    edges = mesh.get_coordinates()[0, :, 0]
    dots = {(int(np.searchsorted(edges, x)) - 1, round(y)) for x, y in axes.collections[1].get_offsets()}
    wanted = set()
    ranks = [grown.first_ranks, *grown.ranks]
    for n in range(10):
        for row in range(18):
            kind, layer = divmod(row, 3)
            k = grown.modules.index(f"bert.encoder.layer.{layer}.{KINDS[kind]}")
            if ranks[n + 1][k] > ranks[n][k]:
                wanted.add((n, row))
    assert dots == wanted


def test_unknown_scores_and_scores_of_0_are_left_grey():
    grown = history(1)
    grown.scores[0][0], grown.scores[3][2] = math.nan, 0.0
    _, mesh = heat_map(draw_scores(grown))
    assert np.argwhere(np.ma.getmaskarray(mesh.get_array())).tolist() == [[0, 0], [2, 3]]


@pytest.mark.parametrize("score", [0.0, 1.0, math.nan])
def test_equal_scores_are_drawn(score, tmp_path):
    grown = history(2)
    grown.scores = [[score] * 12 for _ in grown.scores]
    figure = drawn(draw_scores(grown))
    assert len(extents(figure, heat_map(figure)[0].texts)) == 6


# Files.


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("plot", [plot_ranks, plot_growth, plot_scores])
def test_picture_of_a_directory_is_that_of_its_model(plot, train_bert, tmp_path):
    model, _, scheduler = train_bert()
    scheduler.detach()
    model.save_pretrained(tmp_path / "adapter")
    plot(model, tmp_path / "model.svg")
    plot(str(tmp_path / "adapter"), str(tmp_path / "directory.svg"))
    texts = [
        [line for line in (tmp_path / name).read_text().splitlines() if "<!--" in line]
        for name in ("model.svg", "directory.svg")
    ]
    assert len(texts[0]) > 8
    assert texts[0] == texts[1]


@pytest.mark.parametrize("plot", [plot_ranks, plot_growth, plot_scores])
def test_picture_is_a_png_without_empty_margins(plot, train_bert, tmp_path):
    plot(train_bert()[0], tmp_path / "picture.png")
    width, height = png_size(tmp_path / "picture.png")
    assert 300 < width < 2000
    assert 200 < height < 1500


def test_picture_of_a_partly_adapted_model_is_drawn(make_bert, grow, tmp_path):
    config = growing(
        target_modules=r".*(layer\.0\.attention\.self\.(query|key)|layer\.1.*self\.key|classifier)"
    )
    model = peft.get_peft_model(make_bert(), config)
    grow(model)
    plot_ranks(model, tmp_path / "ranks.png")
    assert min(png_size(tmp_path / "ranks.png")) > 200


@pytest.mark.parametrize("plot", [plot_ranks, plot_growth, plot_scores])
def test_without_matplotlib_a_picture_says_what_to_install(plot, train_bert, tmp_path, monkeypatch):
    model, _, _ = train_bert()
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install .*increlora_rs\[plot\]"):
        plot(model, tmp_path / "picture.png")


def test_picture_into_a_missing_directory_is_refused_by_path(train_bert, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_ranks(train_bert()[0], tmp_path / "nowhere" / "ranks.png")


def test_model_without_layers_is_drawn_module_by_module(make_plain, grow):
    model = peft.get_peft_model(make_plain(), growing(target_modules=["lin0", "lin1"]))
    grow(model, {"lin0": 3, "lin1": 2})
    figure = drawn(draw_ranks(rank_table(model)))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["lin0", "lin1"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "2"]
