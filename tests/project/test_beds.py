"""The test beds: arms of equal size, data that are what they say, tables that follow, runs that resume."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from increlora_rs.compare.methods import Method, parse_methods
from increlora_rs.compare.results import Results, read_results, run_id
from peft import LoraConfig, get_peft_model
from torch import nn

from benches.beds import arms, curve, kinds, memory, overview, planted, ranks, report, runs, spectra, training
from benches.beds.arms import Setting, prepare
from benches.beds.bed import Bed, Figure
from benches.beds.decoder import Size, new_decoder
from benches.beds.kinds import Kind
from benches.beds.modules import linear_sizes
from benches.beds.plan import TUNING, Comparison, Plan
from benches.beds.runs import Runs, told_ranks
from benches.beds.signflip import p_value

LOWER = Figure("loss", higher_is_better=False)
# The seven linear layers of each of two layers, of unequal sizes.
LLAMA = {
    f"model.layers.{layer}.{name}": size
    for layer in range(2)
    for name, size in {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (384, 128),
        "mlp.up_proj": (384, 128),
        "mlp.down_proj": (128, 384),
    }.items()
}


@pytest.mark.parametrize("name", ["lora", "lora-qv", "lora-mlp"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_arms_train_as_many_parameters_as_uniform_lora_and_none_more(name, r):
    config = prepare(Method(name, {}), Setting(r, 16.0, LLAMA, 0)).config
    pattern = {key.removeprefix("^"): rank for key, rank in config.rank_pattern.items()}
    trained = sum(rank * sum(LLAMA[module]) for module, rank in pattern.items())
    budget = r * sum(map(sum, LLAMA.values()))
    # Nothing fits any more: the smallest component takes 320 (value), 512 (MLP).
    smallest = {"lora": 1, "lora-qv": 320 - 128, "lora-mlp": 512}[name]
    assert budget - smallest < trained <= budget


def test_arms_of_one_kind_of_module_have_no_other():
    mlp = ranks.mlp(LLAMA)
    assert sorted({name.rsplit(".", 1)[1] for name in mlp}) == ["down_proj", "gate_proj", "up_proj"]
    names = {name.rsplit(".", 1)[1] for name in ranks.query_and_value(LLAMA)}
    assert names == {"q_proj", "v_proj"}


def test_an_attention_output_of_bert_is_not_the_mlp(make_bert):
    assert [name.partition("encoder.")[2] for name in ranks.mlp(linear_sizes(make_bert()))] == [
        f"layer.{i}.{name}" for i in range(2) for name in ("intermediate.dense", "output.dense")
    ]


def test_components_that_do_not_fit_are_filled_by_what_comes_closest():
    # Rank 1 takes 30; of the 25 that are left, 20 + 0 is closer than 10.
    assert ranks.fill({"a": (5, 5), "b": (10, 10)}, ["a", "b"], 55) == {"a": 1, "b": 2}


def test_all_arms_of_given_ranks_have_the_scale_of_the_budget():
    given = dict.fromkeys(LLAMA, 0) | {"model.layers.0.mlp.up_proj": 6}
    config = prepare(Method("ceiling", {}), Setting(0.5, 16.0, LLAMA, 0, given)).config
    assert config.target_modules == {"model.layers.0.mlp.up_proj"}
    ((alpha,), (rank,)) = config.alpha_pattern.values(), config.rank_pattern.values()
    assert alpha / rank == 16.0 / 0.5


def test_the_cut_takes_what_is_worth_most_for_each_parameter():
    sizes = {"small": (4, 6), "large": (20, 30), "idle": (4, 6)}
    # Per parameter: small 0.5, 0.2, 0.05; large 0.4, 0.1.
    worth = {"small": [5.0, 2.0, 0.5], "large": [20.0, 5.0], "idle": [0.0]}
    assert ranks.cut(sizes, worth, 70) == {"small": 2, "large": 1, "idle": 0}
    # What does not fit leaves its place to what does.
    assert ranks.cut(sizes, worth, 25) == {"small": 2, "large": 0, "idle": 0}
    assert ranks.cut(sizes, worth, 1000) == {"small": 3, "large": 2, "idle": 0}


def test_a_shuffle_within_families_keeps_the_ranks_of_each():
    before = {name: i for i, name in enumerate(LLAMA)}
    after = ranks.shuffled_within(before, 3)
    assert after != before
    for family in ("q_proj", "v_proj", "down_proj"):
        members = [name for name in LLAMA if name.endswith(family)]
        assert sorted(after[name] for name in members) == sorted(before[name] for name in members)
    assert ranks.shuffled_within(before, 3) == after


def test_a_shuffle_over_all_keeps_the_ranks_and_the_size():
    before = {name: i % 4 for i, name in enumerate(LLAMA)}
    after = ranks.shuffled_over(LLAMA, before, 3)
    assert sorted(after.values()) == sorted(before.values())
    was, is_now = (sum(rank * sum(LLAMA[name]) for name, rank in of.items()) for of in (before, after))
    assert 0.97 * was <= is_now <= was
    assert after != before


def test_the_planted_teacher_differs_in_the_planted_modules_alone(make_bert):
    student, teacher = make_bert(), make_bert()
    names = list(linear_sizes(student))
    options = planted.Options(ranks=(2, 3), decay=0.5, norm=0.25)
    lots = torch.Generator().manual_seed(0)
    chosen = planted.draw_modules(names, 2, lots)
    values = planted.plant(teacher, chosen, options, lots)
    before, after = student.state_dict(), teacher.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in chosen}
    for name, rank in zip(chosen, (2, 3), strict=True):
        weight = before[f"{name}.weight"].double()
        found = torch.linalg.svdvals(after[f"{name}.weight"].double() - weight)
        assert found[:rank].tolist() == pytest.approx(values[name], rel=1e-4)
        assert float(found[rank:].max()) < 1e-5
        assert float(found.norm()) == pytest.approx(0.25 * float(weight.norm()), rel=1e-4)
        assert float(found[1] / found[0]) == pytest.approx(0.5, rel=1e-4)


def test_share_of_components_in_planted_modules():
    assert training.share_in(frozenset("ab"), {"a": 3, "b": 0, "c": 1}) == 0.75
    assert training.share_in(frozenset(), {"a": 3}) is None


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # All of one sign: 2 of 2^n choices are as far from 0.
        ([1.0, 1.0, 1.0], 2 / 8),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2 / 64),
        # Sums of +-1 +-2 +-4: 5 is reached or passed by 5, 7, -5, -7.
        ([-1.0, 2.0, 4.0], 4 / 8),
        ([1.0, -1.0], 1.0),
    ],
)
def test_sign_flip(differences, p):
    assert p_value(differences) == p


def test_stored_bits_are_what_strings_hold_less_what_is_missing():
    # Known for certain: 11 bits a token of 2,048. A guess among all of them: none.
    assert memory.stored_bits(torch.zeros(3, 64), 2048) == pytest.approx(3 * 704)
    assert memory.stored_bits(torch.full((3, 64), math.log(2048)), 2048) == pytest.approx(0.0, abs=1e-3)
    # Halved choice, one bit a token.
    assert memory.stored_bits(torch.full((1, 10), math.log(1024)), 2048) == pytest.approx(10.0)


@pytest.fixture
def tiny_memory(monkeypatch):
    monkeypatch.setattr(memory, "trained_weights", lambda size, folder: new_decoder(size).state_dict())
    options = memory.Options(strings=9, tokens=5, key=2, steps=6, batch=4, layers=1)
    return memory.Memory(options, 0)


def test_no_two_strings_have_one_key_and_all_are_learned_as_often(tiny_memory):
    assert len(torch.unique(tiny_memory.strings[:, :2], dim=0)) == 9
    crowded = memory.draw_strings(memory.Options(strings=30, key=2), 7, seed=0)
    assert len(torch.unique(crowded[:, :2], dim=0)) == 30
    order = torch.cat([tiny_memory._order[step] for step in range(6)])
    assert sorted(order[:9].tolist()) == sorted(order[9:18].tolist()) == list(range(9))


def test_the_key_is_given_and_the_rest_is_to_be_told(tiny_memory):
    model = tiny_memory.model().eval()
    with torch.no_grad():
        logits = model(input_ids=tiny_memory.strings).logits.double()
    told = logits[:, 1:6].log_softmax(-1).gather(-1, tiny_memory.strings[:, 2:, None])
    bits = 9 * 5 * math.log2(2048) + float(told.sum()) / math.log(2)
    assert tiny_memory.score(model, 10) == pytest.approx(bits / 10, rel=1e-3)


def test_the_output_embedding_is_no_module_to_adapt():
    sizes = linear_sizes(new_decoder(Size(layers=1)))
    assert len(sizes) == 7 and not any("lm_head" in name for name in sizes)


def test_energies_are_squared_singular_values_of_the_weighted_update():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    z = x @ a.T
    found = spectra.energies(b, 2.0, z.T @ z / 40)
    # The outputs of the update themselves, over the root of their number.
    wanted = torch.linalg.svdvals(2.0 * z @ b.T / 40**0.5)[:3].square()
    assert found == pytest.approx(wanted.tolist())


def test_arms_share_the_rows_of_a_that_both_have(make_plain):
    drawn = []
    for rank in (2, 5):
        config = LoraConfig(r=rank, target_modules=["lin0"])
        model = get_peft_model(make_plain(), config)
        training.draw_alike(model, config, 3)
        drawn.append(model.base_model.model.lin0.lora_A["default"].weight.detach())
    assert torch.equal(drawn[0], drawn[1][:2])
    assert float(drawn[1].abs().max()) <= 12**-0.5
    assert not torch.equal(drawn[1][2], drawn[1][3])


class Tiny(Bed):
    """Two layers learn to give 1; no text."""

    def __init__(self, options, seed, cache):
        self.steps = options.steps
        self.data = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        self.sizes = linear_sizes(self.model())

    def model(self):
        state = torch.get_rng_state()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)
        torch.set_rng_state(state)
        return model

    def loss(self, model, step):
        return (model(self.data) - 1.0).square().mean()

    def observe(self, model):
        self.score(model, 0)

    def score(self, model, parameters):
        with torch.no_grad():
            return float(self.loss(model, 0))


class Options(planted.Options):
    """Sizes by the name that the plan asks for."""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "tiny", Kind(LOWER, Options, [1e-2, 2e-2], 2.0, False, Tiny))
    kinds.bed_of.cache_clear()
    yield lambda text, **changed: Comparison(
        **{
            "kind": "tiny",
            "options": Options(steps=12),
            "arms": parse_methods(text, arms.names(), "--arms"),
            "rs": [2.0],
            "lrs": [1e-2, 2e-2],
            "seeds": 2,
            "tune_seeds": 1,
            "alpha": 16.0,
            "warmup": 0.1,
            "source_r": 4,
        }
        | changed
    )
    kinds.bed_of.cache_clear()


def carried_out(comparison, file):
    told = []
    with Results(file) as results:
        running = Runs(comparison, results, None, 1, told.append)
        running.run()
    assert not running.failed, told
    return told, Plan(comparison, {record["id"]: record for record in results.records}.get)


def test_what_is_in_the_results_is_not_run_again(tiny, tmp_path):
    file = tmp_path / "tiny.jsonl"
    first, _ = carried_out(tiny("lora"), file)
    assert len(first) == 2 + 2
    again, _ = carried_out(tiny("lora"), file)
    assert again == []
    # One seed more, one run more.
    more, _ = carried_out(tiny("lora", seeds=3), file)
    assert len(more) == 1
    assert len(file.read_text().splitlines()) == 5


def test_a_run_that_failed_is_tried_again(tiny, tmp_path, monkeypatch):
    file = tmp_path / "tiny.jsonl"
    with monkeypatch.context() as broken:
        broken.setattr(runs, "train", lambda *_, **__: 1 / 0)
        with Results(file) as results:
            running = Runs(tiny("lora"), results, None, 1, lambda line: None)
            running.run()
        # The paired runs have no learning rate to run at.
        assert running.failed == 2
    told, _ = carried_out(tiny("lora"), file)
    assert len(told) == 4


def test_the_learning_rate_is_chosen_on_seeds_that_are_not_compared(tiny, tmp_path):
    _, plan = carried_out(tiny("lora"), tmp_path / "tiny.jsonl")
    (lora,) = plan.comparison.arms
    scores = {lr: plan.found(lora, 2.0, lr, TUNING)["score"] for lr in (1e-2, 2e-2)}
    best = plan.best_lr(lora, 2.0)
    assert scores[best] == min(scores.values())
    assert sorted(plan.paired(lora, 2.0)) == [0, 1]


def test_every_arm_runs_and_the_table_has_a_row_for_each(tiny, tmp_path):
    comparison = tiny("lora,increlora:growth_end=0.5,lot,ceiling,shuffled-families,shuffled", lrs=[1e-2])
    _, plan = carried_out(comparison, tmp_path / "tiny.jsonl")
    (table,) = report.tables(plan)
    assert [row[0] for row in table.rows] == list(map(str, comparison.arms))
    by_name = {str(arm): plan.paired(arm, 2.0)[0] for arm in comparison.arms}
    assert by_name["lora"]["parameters"] == {"peak": 2 * 26, "final": 2 * 26}
    assert by_name["ceiling"]["parameters"]["final"] <= 2 * 26
    grown = by_name["increlora:growth_end=0.5"]["ranks"]
    told = by_name["shuffled"]["ranks"].values()
    assert sorted(filter(None, told)) == sorted(filter(None, grown.values()))
    assert "standard errors" in table.note


def test_several_budgets_make_a_curve_an_arm(tiny, tmp_path):
    comparison = tiny("lora,lot:init_r=0", rs=[2.0, 0.5, 1.0], lrs=[1e-2])
    _, plan = carried_out(comparison, tmp_path / "tiny.jsonl")
    lora, lot = (curve.points(plan, arm) for arm in comparison.arms)
    # LoRA has whole ranks only; 26 parameters a rank.
    assert [point[0] for point in lora] == [26, 52]
    assert len(lot) == 3 and lot[0][0] <= 0.5 * 28
    scores = [run["score"] for run in plan.paired(comparison.arms[0], 1.0).values()]
    assert lora[0][1:] == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    picture = curve.draw(plan, tmp_path / "tiny.png")
    assert picture is not None and picture.stat().st_size > 0


def test_one_budget_makes_no_curve(tiny, tmp_path):
    _, plan = carried_out(tiny("lora", lrs=[1e-2]), tmp_path / "tiny.jsonl")
    assert curve.draw(plan, tmp_path / "tiny.png") is None


def test_arms_of_whole_ranks_are_left_out_below_one():
    assert not arms.is_possible(Method("lora", {}), 0.5)
    assert arms.is_possible(Method("lora-mlp", {}), 0.5)
    assert arms.is_possible(Method("lora", {}), 4.0)


def test_ranks_that_are_told_may_lack_modules(tiny):
    bed = Tiny(Options(), 0, None)
    found = told_ranks(Method("shuffled", {}), bed, 2.0, 0, {"0": 3})
    assert sorted(found.values()) == [0, 3]
    with pytest.raises(ValueError, match="no trained LoRA"):
        told_ranks(Method("ceiling", {}), bed, 2.0, 0, None)


@pytest.mark.parametrize(
    ("text", "changed", "message"),
    [
        ("lora,shuffled", {}, "name an arm whose ranks"),
        ("lora:rank=3", {}, "rank"),
        ("increlora:groth_end=0.3", {}, "groth_end"),
        ("lora", {"seeds": 0}, "--seeds 0"),
        ("lora", {"rs": [0.0]}, "--r"),
        ("lorra", {}, "--arms: 'lorra' is unknown"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(tiny, text, changed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(text, **changed)


EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
RECORDED = ("planted", "planted-sizes", "text", "memory")


@pytest.mark.parametrize("file", RECORDED)
def test_recorded_runs_are_those_of_the_options_that_there_are(file):
    records = {record["id"]: record for record in read_results(EVIDENCE / f"{file}.jsonl")}
    assert len(records) >= 10
    for record in records.values():
        config = record["config"]
        bed = {name: tuple(size) if isinstance(size, list) else size for name, size in config["bed"].items()}
        (arm,) = parse_methods(config["method"], [*arms.names(), arms.SOURCE], "--arms")
        comparison = Comparison(
            kind=config["task"],
            options=kinds.KINDS[config["task"]].options(**bed),
            arms=[] if arm.name in arms.SHUFFLED else [arm],
            rs=[config["r"]],
            lrs=[config["lr"]],
            seeds=1,
            tune_seeds=1,
            alpha=config["alpha"],
            warmup=config["warmup"],
            source_r=16,
        )
        teller = records.get(config["told_by"])
        assert (teller is None) == (config["told_by"] is None)
        plan = Plan(comparison, lambda _: None)
        plan.teller = lambda *_, teller=teller: teller
        made = plan.config(arm, config["r"], config["lr"], config["seed"])
        assert run_id(made | {"python": config["python"]}) == record["id"]


def test_overviews_have_each_budget_and_size(tiny, tmp_path):
    comparison = tiny("lora,increlora:growth_end=0.5,ceiling", rs=[1.0, 2.0, 0.5], lrs=[1e-2])
    _, plan = carried_out(comparison, tmp_path / "tiny.jsonl")
    table = overview.by_budget(plan)
    assert table.header == ["arm", "r = 0.5", "r = 1", "r = 2"]
    by_arm = {row[0]: row[1:] for row in table.rows}
    # No LoRA, and so no ratio, below one component a module.
    assert by_arm["lora"][0] == "" and "(" not in by_arm["increlora:growth_end=0.5"][0]
    score, ratio = by_arm["increlora:growth_end=0.5"][2].rstrip(")").split(" (")
    ours, plain = (
        [run["score"] for run in plan.paired(arm, 2.0).values()] for arm in reversed(comparison.arms[:2])
    )
    assert float(score) == pytest.approx(np.mean(ours), rel=1e-2)
    assert float(ratio) == pytest.approx(math.exp(np.mean(np.log(ours) - np.log(plain))), rel=1e-2)
    plan.comparison.rs[:] = [2.0]
    (row,) = overview.by_size([plan], ["ranks", "steps"]).rows
    assert row[0] == "ranks 12 + 12 + 12, steps 12" and row[4] == ratio


def record_of(score, final=100):
    return {
        "score": score,
        "parameters": {"peak": final, "final": final},
        "share": None,
        "seconds": 1.0,
        "config": {"lr": 0.01},
    }


def test_ratios_and_wins_are_taken_seed_by_seed():
    plain = {0: record_of(1.0), 1: record_of(2.0), 2: record_of(9.0)}
    better = {0: record_of(0.5), 1: record_of(4.0)}
    row = report._row(LOWER, "x", better, plain)
    assert row[3:6] == ["1", "1/2", "1.00"]
    bits = Figure("bits", higher_is_better=True)
    assert report.log_gains(bits, better, plain) == pytest.approx([-math.log(2), math.log(2)])
    # Less than nothing is next to nothing.
    assert report.log_gains(bits, {0: record_of(-0.2)}, plain)[0] < -5


def test_a_ceiling_that_is_not_ahead_is_told():
    plain = {seed: record_of(1.0) for seed in range(4)}
    near = {seed: record_of(1.0 + 0.01 * (-1) ** seed) for seed in range(4)}
    far = {seed: record_of(0.5 + 0.01 * seed) for seed in range(4)}
    assert "says nothing" in report.ceiling_note(LOWER, near, plain)[0]
    assert "says nothing" not in report.ceiling_note(LOWER, far, plain)[0]


def test_the_results_are_lines_of_json_with_all_options(tiny, tmp_path):
    file = tmp_path / "tiny.jsonl"
    carried_out(tiny("increlora:growth_end=0.5", lrs=[1e-2], seeds=1), file)
    (record,) = map(json.loads, file.read_text().splitlines())
    config = record["config"]
    assert config["bed"]["steps"] == 12 and config["seed"] == 0
    assert config["resolved"]["growth_end"] == 0.5 and config["resolved"]["importance"] == "fluctuation"
