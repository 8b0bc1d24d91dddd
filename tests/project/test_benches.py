"""The benchmarks: they run from end to end, what they compare with is right, their verdicts follow."""

import json

import pytest
import torch
from increlora_rs import IncreLoraConfig, attach
from peft import get_peft_model
from torch import nn

from benches import blocks, depth, floor, literal, memory, results, sizes, step, timing, training
from benches.__main__ import main
from benches.bars import Bar, bars, whole_step
from benches.methods import (
    ADALORA,
    FROZEN,
    LITERAL,
    LORA,
    METHODS,
    OUR_ADALORA,
    OURS,
    PRECISIONS,
    training_model,
)
from benches.tables import Table, number

LR = 0.05
ORTHOGONALITY = 0.1


@pytest.fixture
def pair():
    """Our model and the literal one, float64, of the same numbers, rank 2 and 1 in reserve."""

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()

    config = IncreLoraConfig.paper(
        r=3,
        init_r=2,
        lora_alpha=16,
        target_modules=["0", "2"],
        orth_reg_weight=ORTHOGONALITY,
        restart_warmup=False,
        tinit=2,
        deltaT=3,
        top_h=1,
    )
    ours = get_peft_model(build(), config, autocast_adapter_dtype=False).double()
    theirs = literal.adapt(build(), ["0", "2"], rank=2, reserve=1, alpha=16.0, dtype=torch.float64)
    return ours, theirs


def same_numbers(ours, theirs, scheduler):
    """Copies our parameters, the reserve that the scheduler drew included, with E that is not 0."""
    layers = [module for module in ours.modules() if hasattr(module, "lora_E")]
    with torch.no_grad():
        for layer, other in zip(layers, literal.literal_layers(theirs), strict=True):
            layer.lora_E["default"].weight.uniform_(0.5, 1.5)
            other.a.copy_(layer.lora_A["default"].weight)
            other.b.copy_(layer.lora_B["default"].weight)
            other.e.copy_(layer.lora_E["default"].weight)
    assert scheduler.total_rank == 4
    return layers


def test_the_literal_method_trains_as_ours_does(pair):
    ours, theirs = pair
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=LR)
    scheduler = attach(ours, optimizer, total_steps=100)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=LR)
    layers = same_numbers(ours, theirs, scheduler)
    literal_layers = literal.literal_layers(theirs)
    literal_scheduler = literal.LiteralScheduler(literal_layers, other, interval=3, top_h=1)
    x, target = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    for _ in range(3):
        output, expected = ours(x), theirs(x)
        assert torch.allclose(output, expected, rtol=1e-12)
        optimizer.zero_grad()
        other.zero_grad()
        (output - target).pow(2).mean().backward()
        regulariser = ORTHOGONALITY * literal.orthogonality(literal_layers)
        ((expected - target).pow(2).mean() + regulariser).backward()
        literal_scheduler.before_step()
        optimizer.step()
        other.step()
        scores = list(scheduler.scores.values())
        assert scores == pytest.approx(literal_scheduler.scores, rel=1e-9)
        assert min(scores) > 0.0
        for layer, theirs_layer in zip(layers, literal_layers, strict=True):
            rows = theirs_layer.a.shape[0]
            # At the growth ours draws the next reserve, which has no counterpart yet.
            assert torch.allclose(layer.lora_A["default"].weight[:rows], theirs_layer.a, rtol=1e-9)
            assert torch.allclose(layer.lora_B["default"].weight[:, :rows], theirs_layer.b, rtol=1e-9)
            assert torch.allclose(
                layer.lora_E["default"].weight[: theirs_layer.rank], theirs_layer.e, rtol=1e-9
            )
        literal_scheduler.after_step()
        assert [layer.rank for layer in literal_layers] == list(scheduler.ranks.values())
    assert sum(scheduler.ranks.values()) == 5


def test_the_literal_method_goes_on_after_a_growth(pair):
    _, theirs = pair
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad])
    layers = literal.literal_layers(theirs)
    scheduler = literal.LiteralScheduler(layers, optimizer, interval=2, top_h=1)
    x = torch.randn(4, 7, dtype=torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        theirs(x).pow(2).mean().backward()
        scheduler.before_step()
        optimizer.step()
        scheduler.after_step()
    assert sum(layer.rank for layer in layers) == 6
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_the_same_layers_in_its_precision(method, precision):
    model = training_model(method, sizes.SMOKE, precision=PRECISIONS[precision], dropout=0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    a = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and ("lora_A" in name or name[-2:] == ".a")
    ]
    assert len(a) == (0 if method == FROZEN else len(floor.layers_of_step(sizes.SMOKE)))
    assert all(p.shape[0] == sizes.SMOKE.rank for p in a)
    assert {p.dtype for p in parameters} <= {PRECISIONS[precision].adapter}


@pytest.mark.parametrize("method", [ADALORA, LITERAL])
def test_the_regulariser_takes_part_in_the_loss(method):
    training = step.Training(method, sizes.SMOKE, "float32", 0.0)
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            if "lora_E" in name:
                parameter.zero_()
    training.backward(training.data)
    # E is 0: of the active components, B has a gradient by the regulariser alone.
    names = ("lora_B.default", ".b")
    factors = [p for name, p in training.model.named_parameters() if name.endswith(names)]
    assert len(factors) == len(floor.layers_of_step(sizes.SMOKE))
    assert all(p.grad[:, : sizes.SMOKE.rank].abs().sum() > 0.0 for p in factors)


def test_lorta_with_updates_built_is_lorta():
    ours, dense = (
        depth.projections(method, sizes.SMOKE, PRECISIONS["float32"], 0.0).double()
        for method in (depth.LORTA, depth.DENSE)
    )
    of_ours, of_dense = ([p for p in model.parameters() if p.requires_grad] for model in (ours, dense))
    with torch.no_grad():
        for k, (one, other) in enumerate(zip(of_ours, of_dense, strict=True)):
            # B has its rank first in both.
            other.normal_()
            one.copy_(other if k == 1 else other.t())
    x = torch.randn(5, sizes.SMOKE.width, dtype=torch.float64)
    y, wanted = ours(x), dense(x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(y.square().sum(), of_ours)
    for k, other in enumerate(torch.autograd.grad(wanted.square().sum(), of_dense)):
        found = gradients[k] if k == 1 else gradients[k].t()
        torch.testing.assert_close(found, other, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(("ours", "published"), blocks.PAIRS.items())
def test_what_melora_and_mora_are_compared_with_computes_the_same(ours, published):
    first, second = (
        blocks.adapted(method, sizes.SMOKE, PRECISIONS["float32"], 0.0).double()
        for method in (ours, published)
    )
    # Nothing is folded there.
    first.down, second.down = nn.Identity(), nn.Identity()
    for mine, theirs in zip(first.children(), second.children(), strict=True):
        if isinstance(theirs, nn.Identity):
            continue
        mine.get_base_layer().load_state_dict(theirs.base.state_dict())
        with torch.no_grad():
            if ours.startswith("MoRA"):
                mine.lora_A["default"].weight.copy_(theirs.m.weight)
            else:
                mine.lora_A["default"].weight.copy_(torch.stack([a.weight for a in theirs.a]))
                mine.lora_B["default"].weight.copy_(torch.stack([b.weight for b in theirs.b]))
    x = torch.randn(5, sizes.SMOKE.width, dtype=torch.float64)
    # The literal angles are float32's.
    torch.testing.assert_close(first(x), second(x), rtol=1e-6, atol=1e-6)


def test_bars_of_melora_and_mora_are_computed_from_the_figures():
    milliseconds = {FROZEN: 10.0, LORA: 20.0}
    for k, (ours, published) in enumerate(blocks.PAIRS.items()):
        milliseconds |= {ours: 14.0 + 4 * k, published: 20.0 + k}
    record = {"precision": "float32", "dropout": 0.1, "ms": {k: [v] for k, v in milliseconds.items()}}
    found = bars({"blocks": [record]})
    assert [bar.value for bar in found] == pytest.approx([0.4, 0.7, 8 / 11, 0.9, 1.0, 1.1, 16 / 13, 1.3])
    assert [bar.limit for bar in found] == [0.5, 1.1, 0.5, 1.1, 0.7, 1.1, 0.7, 1.1]
    assert [bar.passed for bar in found] == [True, True, False, True, False, True, False, False]


def test_saved_bytes_count_a_storage_once_and_no_parameter():
    weight = nn.Parameter(torch.randn(4, 4))
    x = torch.randn(3, 4)

    def forward():
        # x for the two weight gradients, in one storage; weight for none of them, its input being no leaf
        # that wants a gradient.
        return (x @ weight + x.view(3, 4) @ weight).sum()

    assert memory.saved_bytes(forward, [weight]) == x.nbytes
    scaled = torch.randn(3, 4, requires_grad=True)
    assert memory.saved_bytes(lambda: scaled.exp(), []) == scaled.nbytes


def test_rounds_time_every_call_once():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = timing.interleave(calls, seconds=0.0, rounds=(4, 9), warmup=1)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 5
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_ratios_are_taken_round_by_round():
    samples = {"a": [2.0, 40.0, 3.0], "b": [1.0, 10.0, 2.0]}
    assert timing.ratio(samples, "a", "b") == 2.0
    assert timing.overhead(samples, "a", "b") == 1.0


def test_the_floor_of_a_layer():
    work = floor.adapter((10, 20), 100, 2, 0.1, 4)
    assert work.flops == 6 * 100 * 2 * 30
    # x read twice, dx read and written; y read and written, gy read; a bit of mask written and read twice.
    assert work.bytes == 4 * 100 * (4 * 10 + 3 * 20) + 3 * 100 * 10 / 8
    rates = floor.Rates({4: 1e6, 2: 2e6}, 1e9)
    assert rates.milliseconds(work, 4) == pytest.approx(36.0)
    assert floor.Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates


@pytest.mark.parametrize(
    ("value", "at_most", "passed"),
    [
        (0.4, True, True),
        (0.41, True, False),
        (0.39, False, False),
        (0.4, False, True),
        (float("nan"), True, False),
        (float("nan"), False, False),
    ],
)
def test_a_bar_is_kept_up_to_its_limit(value, at_most, passed):
    assert Bar("", value, 0.4, at_most).passed is passed


def made_up(ours=140.0, armed=200.0):
    """Figures of a run in which PEFT LoRA adds 100 ms to 100, ours ``ours`` in all."""
    passes = {FROZEN: [100.0], LORA: [200.0], ADALORA: [220.0], LITERAL: [400.0], OURS: [ours]}
    whole = {LORA: [200.0], ADALORA: [250.0], LITERAL: [400.0], step.SPENT: [1.0]}
    whole |= {step.UNARMED: [100.0], step.ARMED: [armed]}
    place = {"precision": "float32", "dropout": 0.1}
    layer = {"shape": [8, 8], "tokens": 4, "rank": 2, **place, "ms": passes}
    return {
        "step": {
            "passes": [place | {"ms": passes}],
            "steps": [place | {"ms": whole, "armed_share": 0.5, "event_ms": [100.0], "interval": 10}],
        },
        "memory": {"model": [place | {"bytes": {FROZEN: 50, LORA: 150, OURS: 90}}]},
        "scheduler": [
            {"modules": 500, "form": "paper", "hooks": {"quiet": [0.1], "armed": [2.5], "growth": [40.0]}},
            {"modules": 10, "form": "paper", "hooks": {"quiet": [9.0], "armed": [9.0], "growth": [99.0]}},
        ],
        "layer": [layer, layer | {"ms": passes | {OURS: [208.0]}, "tokens": 5}],
    }


def test_bars_are_computed_from_the_figures():
    found = {bar.promise: bar for bar in bars(made_up())}
    assert [(round(bar.value, 6), bar.limit, bar.passed) for bar in found.values()] == [
        (0.4, 0.4, True),  # 40 of 100 ms
        (0.8, 1.0, True),  # half of 100, half of 200, a tenth of 100, over 200
        (0.64, 0.85, True),
        (2.5, 1.6, True),
        (0.4, 0.4, True),
        (2.5, 2.0, False),
        (40.0, 50.0, True),
        (1.04, 1.03, False),
    ]
    assert "5 tokens" in found["slowest layer over PEFT LoRA's"].note


def test_bars_of_lorta_and_prilora_are_computed_from_the_figures():
    place = {"precision": "float32", "dropout": 0.1}
    passes = place | {"ms": {FROZEN: [1.0], LORA: [2.0], depth.DENSE: [4.0], depth.LORTA: [2.3]}}
    steps = place | {"ms": {LORA: [2.0], depth.PRILORA: [2.2]}}
    found = bars({"depth": {"passes": [passes], "steps": [steps]}})
    assert [(bar.value, bar.limit, bar.passed) for bar in found] == [
        (pytest.approx(0.575), 0.6, True),
        (pytest.approx(1.15), 1.1, False),
        (pytest.approx(1.1), 1.1, True),
    ]


def test_bars_of_small_layers_are_over_the_frozen_ones():
    record = {"precision": "float32", "dropout": 0.1, "ms": {FROZEN: [1.0], LORA: [3.0], OURS: [2.5]}}
    (found,) = bars({"host": [record]})
    assert (found.value, found.limit, found.passed) == (0.75, 0.5, False)


def test_bars_of_a_whole_training_are_computed_from_the_figures():
    place = {"precision": "float32", "dropout": 0.1}
    samples = {FROZEN: [1.0, 1.0, 1.0], LORA: [2.0, 2.0, 2.0], OURS: [1.2, 1.2, 1.5]}
    peaks = {FROZEN: 100, LORA: 300, OURS: 130}
    rates = floor.Rates({4: 1e12, 2: 1e12}, 1e9)
    figures = {
        "floor": rates.to_json(),
        "steps": [place | {"ms": samples}],
        "peak": [place | {"method": method, "built": 50, "peak": peak} for method, peak in peaks.items()],
    }
    found = bars({"size": "smoke", "training": figures})
    # The event in the third step counts in the whole, and in the median overhead not.
    least = training.least(sizes.SMOKE, rates, "float32", 0.1)
    assert [bar.value for bar in found] == pytest.approx([0.65, 0.2 / least, 0.15])
    assert [bar.limit for bar in found] == [0.7, 1.3, 0.12]
    # What no layer could do better, beside the bars.
    assert found[0].note == f"the frozen model and the floor: {(1.0 + least) / 2.0:.3f}"
    assert found[2].note == ""
    saved = {"model": [place | {"bytes": {FROZEN: 10, LORA: 90, OURS: 30}}]}
    assert bars({"size": "smoke", "training": figures, "memory": saved})[2].note.endswith("save: 0.100")


def test_a_whole_training_has_events():
    whole = training.Whole(OURS, sizes.SMOKE, "float32", 0.1, 12)
    for _ in range(12):
        whole.step()
    assert whole.scheduler.step == 12
    assert len(whole.scheduler.history) > 0
    assert whole.scheduler.spent <= whole.scheduler.budget


def test_a_clock_may_be_given():
    ticks = iter(range(100))
    samples = timing.interleave({"a": bool}, seconds=0.0, rounds=(2, 2), clock=lambda: next(ticks))
    assert samples == {"a": [1e3, 1e3]}


def test_bars_fail_where_the_figures_are_worse():
    kept = {bar.promise: bar.passed for bar in bars(made_up(ours=141.0, armed=400.0))}
    assert [passed for promise, passed in kept.items() if "overhead" in promise] == [False]
    steps = ("whole step", "literal")
    assert [kept[promise] for promise in kept if promise.startswith(steps)] == [False, False, False]


def test_the_bar_of_adalora_is_over_pefts():
    figures = made_up()
    figures["step"]["steps"][0]["ms"][OUR_ADALORA] = [150.0]
    (found,) = (bar for bar in bars(figures) if bar.promise.startswith("AdaLoRA's whole step"))
    assert (found.value, found.limit, found.passed) == (0.6, 0.7, True)


def test_bars_of_sections_that_were_not_measured_are_left_out():
    figures = made_up()
    del figures["step"], figures["layer"], figures["scheduler"]
    assert [bar.limit for bar in bars(figures)] == [0.4]


def test_our_step_is_the_mean_over_an_interval():
    record = made_up()["step"]["steps"][0]
    assert whole_step(record)[OURS] == [160.0]


def test_a_table_in_markdown():
    table = Table("Title", ["a", "b"], "A note.")
    table.add("x", 0.12345)
    assert table.markdown() == "## Title\n\nA note.\n\n| a | b |\n| --- | --- |\n| x | 0.123 |\n"
    assert [number(v) for v in (0.0, 1234.5, 12.34, 1.234)] == ["0", "1234", "12.3", "1.23"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benches")
    assert main(["--smoke", "--out", str(folder)]) == 0
    return folder


def test_a_run_gives_every_section_and_its_report(smoke):
    figures = json.loads((smoke / "results.json").read_text())
    sections = {"machine", "floor", "step", "layer", "memory", "scheduler", "blocks", "depth", "others"}
    assert sections <= set(figures)
    report = (smoke / "RESULTS.md").read_text()
    titles = ("Bars", "Whole training step", "Scheduler", "Adapted layer", "Saved for the backward")
    for title in (*titles, "Projections of attention"):
        assert f"## {title}" in report
    for picture in ("overhead.png", "tokens.png", "scheduler.png"):
        assert picture in report
        assert (smoke / picture).read_bytes()[:4] == b"\x89PNG"
    assert "nan" not in report


def test_the_importance_window_is_seen_in_the_steps(smoke):
    record = json.loads((smoke / "results.json").read_text())["step"]["steps"][0]
    # max(beta)^n < 1e-3 first at n = 43, of an interval of 100.
    assert record["armed_share"] == 0.43


def test_raw_figures_give_the_same_report_again(smoke, tmp_path):
    assert main(["--render", str(smoke / "results.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == (smoke / "RESULTS.md").read_text()
    assert not (tmp_path / "results.json").exists()


def test_a_noisy_machine_is_named(smoke):
    figures = json.loads((smoke / "results.json").read_text())
    figures["others"] = {"step": 0.5, "layer": 0.0}
    assert any("not quiet" in line and "step 50%" in line for line in results.conditions(figures))
    figures["others"] = {"step": 0.01, "layer": None}
    assert not any("not quiet" in line for line in results.conditions(figures))


def test_a_section_alone(tmp_path):
    assert main(["--smoke", "--only", "scheduler", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "results.json").read_text())
    assert "scheduler" in figures
    assert "step" not in figures


def test_peak_memory_is_read_in_a_process_of_its_own():
    found = memory.peak(sizes.SMOKE, FROZEN, "float32", 0.0)
    assert found["peak"] >= found["built"] > 10e6
