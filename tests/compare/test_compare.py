"""Methods side by side: tasks and metrics, equal budgets, learning rates, resuming, tables."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch
from comparing import WORDS, lines, save_tokenizer
from increlora_rs import IncreLoraConfig
from increlora_rs.cli import main
from increlora_rs.compare.base_model import BaseModel
from increlora_rs.compare.choice import best_lr
from increlora_rs.compare.methods import Setting, names, parse_methods
from increlora_rs.compare.metrics import headline, measure, official
from increlora_rs.compare.results import Results, read_results, run_id
from increlora_rs.compare.summary import Spread, summarise
from increlora_rs.compare.tasks import read_task
from increlora_rs.methods import METHODS as OURS
from peft import AdaLoraConfig, LoraConfig
from torch import nn
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification

METHODS = (
    "lora,rslora,adalora,adalora_rs,increlora,lora_mini,paper,increlora-random,increlora-given,lora-given"
)
TARGETS = "query,key,value"


@pytest.fixture(scope="module")
def encoder(make_bert, tmp_path_factory):
    """A BERT of 2 layers whose query, key and value are all of one size, with a tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    make_bert().save_pretrained(folder)
    save_tokenizer(folder, pad=True)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A Llama of 2 layers with a tokenizer that has no padding token."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, pad=False)
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The same as one file, with blocks of eight bits where they fit."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens, hidden, inner = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS)], 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.NORMAL] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(3)

    def add(name, *shape):
        weight = random.normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    for name in ("output_norm", *(f"blk.{k}.{norm}_norm" for k in range(2) for norm in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    for name in ("token_embd", "output"):
        add(f"{name}.weight", len(tokens), hidden)
    for k in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{k}.{name}.weight", hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{k}.{name}.weight", inner, hidden)
        add(f"blk.{k}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def reviews(tmp_path):
    """A task of 30 rows to learn from, 10 to measure on and 6 to test on."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "train.tsv").write_text(lines(30))
    (folder / "test.tsv").write_text(lines(6))
    with gzip.open(folder / "dev.tsv.gz", "wt") as file:
        file.write(lines(10))
    return folder


@pytest.fixture
def command(encoder, reviews, tmp_path):
    """The arguments of a comparison that takes a second or two a method."""

    def build(*more, model=encoder, task=reviews, methods="lora,increlora", epochs=2):
        base = ["compare", "--model", model, "--task", task, "--out", tmp_path / "runs.jsonl"]
        base += ["--methods", methods, "--epochs", epochs, "--batch", 5, "--max-length", 8]
        base += ["--lr", "0.01", "--seeds", 1, "--targets", TARGETS]
        return [str(part) for part in [*base, *more]]

    return build


@pytest.fixture
def results(tmp_path):
    return lambda: [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]


# Tasks.


def test_a_folder_is_read_with_its_classes_and_its_test_set(reviews):
    task = read_task(reviews)
    assert (task.name, task.labels, task.is_regression) == ("reviews", ["0", "1"], False)
    assert [len(rows) for rows in task.splits.values()] == [30, 10, 6]
    assert task.train[1].first.endswith("good")


def test_quotes_are_plain_text_in_tsv_and_quote_in_csv(tmp_path):
    (tmp_path / "a.tsv").write_text('text_a\ttext_b\tlabel\n"he said\tshe, said"\tyes\n' * 1 + "x\ty\tno\n")
    (tmp_path / "b.csv").write_text('text_a,text_b,label\n"one, two",three,yes\nx,y,no\n')
    tsv, csv = read_task(tmp_path / "a.tsv"), read_task(tmp_path / "b.csv")
    assert ('"he said', 'she, said"') in {(row.first, row.second) for row in tsv.train + tsv.dev}
    assert ("one, two", "three") in {(row.first, row.second) for row in csv.train + csv.dev}
    assert csv.labels == ["no", "yes"]


def test_one_file_is_split_always_alike(tmp_path):
    rows = [json.dumps({"text": f"a{k}", "label": "x" if k % 3 else "y"}) for k in range(20)]
    (tmp_path / "songs.jsonl").write_text("\n".join(rows))
    task, again = read_task(tmp_path / "songs.jsonl"), read_task(tmp_path / "songs.jsonl")
    assert (task.name, len(task.train), len(task.dev), task.test) == ("songs", 16, 4, [])
    assert task == again
    assert not {row.first for row in task.train} & {row.first for row in task.dev}


def test_numbers_with_a_point_are_scores_and_without_are_classes_in_their_order(tmp_path):
    (tmp_path / "scores.tsv").write_text(lines(12, score=True))
    (tmp_path / "classes.jsonl").write_text(
        "\n".join(json.dumps({"text": "a", "label": k}) for k in [10, 9, 1, 10, 9, 1])
    )
    assert read_task(tmp_path / "scores.tsv").is_regression
    assert read_task(tmp_path / "classes.jsonl").labels == ["1", "9", "10"]


def test_a_limit_draws_the_same_rows_of_all_classes(reviews):
    task = read_task(reviews)
    assert task.limited(8) == task.limited(8)
    assert [len(rows) for rows in task.limited(8).splits.values()] == [8, 8, 6]
    assert {row.label for row in task.limited(8).train} == {"0", "1"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.txt", "a\n", "must end in .tsv, .csv, .jsonl"),
        ("rows.tsv", "sentence\tlabel\na\t1\n", "row 1 has no text_a or text"),
        ("rows.tsv", "text\tlabel\na\t1\nb\n", "row 2 has no label"),
        ("rows.tsv", "text\tlabel\n", "no rows to learn from"),
    ],
)
def test_a_file_that_is_no_task_is_told(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        read_task(tmp_path / name)


# Metrics.

# Of the predictions 1 1 0 0 1 0 for 1 0 0 1 1 0: 2 true and 1 false positives, 2 true and 1 false negatives.
GOLD = np.array([1, 0, 0, 1, 1, 0])
OUTPUTS = np.eye(2)[[1, 1, 0, 0, 1, 0]]


def test_metrics_of_classes_are_those_counted_by_hand():
    metrics = measure(("accuracy", "f1", "matthews"), OUTPUTS, GOLD)
    # F1 = 2 * 2 / (2 * 2 + 1 + 1); Matthews = (2 * 2 - 1 * 1) / sqrt(3 * 3 * 3 * 3).
    assert metrics == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "matthews": 1 / 3})


def test_metrics_of_scores_are_those_counted_by_hand():
    gold, outputs = np.array([0.0, 1.0, 2.0, 3.0]), np.array([[0.0], [2.0], [1.0], [5.0]])
    # Deviations -1.5 -.5 .5 1.5 and -2 0 -1 3: 7 / sqrt(5 * 14). Ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert measure(("pearson", "spearman"), outputs, gold) == pytest.approx(
        {"pearson": 7 / 70**0.5, "spearman": 0.8}
    )


@pytest.mark.parametrize("outputs", [np.full((4, 1), 2.5), np.full((4, 1), np.nan)])
def test_a_constant_prediction_correlates_with_nothing(outputs):
    assert measure(("pearson", "spearman"), outputs, np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}


def test_one_class_alone_has_no_correlation_and_no_f1():
    assert measure(("f1", "matthews"), np.eye(2)[[0] * 6], GOLD) == {"f1": 0.0, "matthews": 0.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("MRPC", ("accuracy", "f1")), ("CoLA", ("matthews",)), ("RTE", ("accuracy",)), ("mine", ("accuracy",))],
)
def test_the_official_metrics_go_by_the_tasks_name(tmp_path, name, expected):
    (tmp_path / f"{name}.tsv").write_text(lines(10))
    assert official(read_task(tmp_path / f"{name}.tsv")) == expected


def test_scores_have_both_correlations_and_glues_mean(tmp_path):
    (tmp_path / "STS-B.tsv").write_text(lines(12, score=True))
    assert official(read_task(tmp_path / "STS-B.tsv")) == ("pearson", "spearman")
    assert headline({"pearson": 0.8, "spearman": 0.6}) == pytest.approx(0.7)


# Methods.

SETTING = Setting(2, 100, 0, {"lora_alpha": 16.0, "lora_dropout": 0.0, "target_modules": ["query"]})


def test_options_belong_to_the_method_before_them():
    methods = parse_methods("lora,increlora:orth_reg_weight=0.1,restart_warmup=false,adalora")
    assert [str(method) for method in methods] == [
        "lora",
        "increlora:orth_reg_weight=0.1,restart_warmup=false",
        "adalora",
    ]
    config = methods[1].prepare(SETTING).config
    assert (config.orth_reg_weight, config.restart_warmup) == (0.1, False)


def test_a_window_of_every_step_can_be_written():
    (method,) = parse_methods("increlora:importance=gradient,importance_window=None")
    assert method.prepare(SETTING).config.importance_window is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lorra", "'lorra' is unknown"),
        ("", "give one or more"),
        ("lora,lora", "each once"),
        ("lora:alpha", "no option"),
        ("lora:tinit=3", "'tinit' is neither an option of LoraConfig"),
        ("lora:growth_end=0.3", "neither an option of LoraConfig"),
        ("lora:e_lr=2", "that have an E"),
        ("lora_mini:e_lr=2", "that have an E"),
        ("lora_mini:init_r=1", "neither an option of LoraMiniConfig"),
        ("lora_mini:lora_b=1", "r=2 is above lora_a=32 or lora_b=1"),
        ("increlora:e_lr=0", "above 0"),
        ("increlora:growth_end=1.5", "growth_end=1.5"),
        ("increlora:beta1=2", "beta1"),
    ],
)
def test_a_wrong_method_or_option_is_told(text, told):
    with pytest.raises((ValueError, TypeError), match=told):
        [method.prepare(SETTING) for method in parse_methods(text)]


@pytest.mark.parametrize("ours", OURS, ids=lambda method: method.name)
def test_each_method_is_compared_by_its_name_at_the_rank_of_all(ours):
    (method,) = parse_methods(ours.name)
    config = method.prepare(SETTING).config
    own_scale = ours.config().lora_alpha is None
    assert (type(config), config.r, config.lora_alpha) == (
        ours.config,
        SETTING.r,
        None if own_scale else 16.0,
    )
    options = method.resolved(SETTING)
    assert options == json.loads(json.dumps(options))


def test_the_halves_of_lora_mini_are_options_that_tell_its_runs_apart():
    (plain,), (small,) = map(parse_methods, ("lora_mini", "lora_mini:lora_a=8,lora_b=4"))
    assert small.resolved(SETTING) == plain.resolved(SETTING) | {"lora_a": 8, "lora_b": 4}
    assert "module_sizes" not in plain.resolved(SETTING)


def test_a_run_is_told_apart_by_every_option_of_its_own():
    (plain,), (lora,), (adalora,) = map(parse_methods, ("increlora", "lora", "adalora"))
    assert lora.resolved(SETTING) == {}
    assert adalora.resolved(SETTING)["init_r"] == math.ceil(1.5 * SETTING.r)
    options = plain.resolved(SETTING)
    assert options == json.loads(json.dumps(options))
    assert options["growth_end"] == IncreLoraConfig().last_growth == 0.75
    assert not {"rank_pattern", "inits"} & options.keys()
    (early,) = parse_methods("increlora:growth_end=0.25")
    assert early.resolved(SETTING) == options | {"growth_end": 0.25}


def test_adalora_starts_with_half_as_much_again_and_ends_at_the_rank():
    (method,) = parse_methods("adalora")
    config = method.prepare(SETTING).config
    assert isinstance(config, AdaLoraConfig)
    assert (config.init_r, config.target_r, config.total_step) == (3, 2, 100)
    assert config.tinit < config.total_step - config.tfinal < config.total_step


def test_given_ranks_keep_the_scale_of_the_default_form():
    (method,) = parse_methods("lora-given")
    config = method.prepare(Setting(2, 100, 0, SETTING.shared, {"layer.query": 3})).config
    assert type(config) is LoraConfig
    (key,) = config.rank_pattern
    assert config.alpha_pattern[key] / config.rank_pattern[key] == 16.0 / 2


# Runs.


@pytest.mark.slow
def test_all_methods_end_with_the_same_budget_and_parameters(command, results, capsys):
    assert main(command(methods=METHODS)) == 0
    runs = {run["config"]["method"]: run for run in results()}
    # SoRA decides itself what it ends with, PRILoRA's ranks rise, and those of the other three are no LoRA's.
    others = {"sora", "prilora", "lorta", "melora", "mora"}
    assert set(runs) == set(METHODS.split(",")) == set(names()) - others
    modules = 6
    for name, run in runs.items():
        assert run["status"] == "done", name
        assert run["total_rank"] == run["budget"] == 2 * modules, name
        # Every module is 32 x 32: 64 numbers a component, and one more where there is an E.
        # So are LoRA-Mini's halves of 32.
        with_e = name not in ("lora", "rslora", "lora_mini", "lora-given")
        assert run["parameters"]["adapter"] == 2 * modules * (65 if with_e else 64), name
        assert run["parameters"]["head"] == 32 * 2 + 2, name
        assert len(run["epochs"]) == 2, name
        assert set(run["epochs"][0]) == set(run["test"]) == {"accuracy"}, name
        assert run["steps"] == 12 and run["seconds_a_step"] > 0, name
    for name in ("adalora", "adalora_rs"):
        assert runs[name]["parameters"]["held"] == 3 * modules * 65
    assert set(runs["lora"]["ranks"].values()) == {2}
    for name in ("increlora-given", "lora-given"):
        assert runs[name]["ranks"] == runs["increlora"]["ranks"]
        assert runs[name]["config"]["given"] == runs["increlora"]["ranks"]
    said = capsys.readouterr().out
    assert "increlora-random" in said
    assert f"reviews r=2: {2 * modules * 64} trained parameters can hold some 1.54 kbit" in said
    assert "30 labels some 30 bit" in said


@pytest.mark.slow
def test_methods_that_allocate_have_budgets_below_one_component_a_module(command, results):
    method = "increlora:importance=fluctuation"
    assert main(command("--r", "0.5,1", methods=method)) == 0
    half, one = results()
    assert (half["config"]["r"], half["budget"], half["total_rank"]) == (0.5, 3.0, 3)
    assert (one["config"]["r"], one["budget"], one["total_rank"]) == (1, 6, 6)


@pytest.mark.slow
def test_the_table_has_the_parameters_and_ranks_of_melora_and_mora(command, results):
    assert main(command(methods="lora,melora,mora,mora:mora_type=6")) == 0
    lora, slices, *squares = results()
    assert [run["config"]["method"] for run in squares] == ["mora", "mora:mora_type=6"]
    assert slices["parameters"]["adapter"] == lora["parameters"]["adapter"]
    assert slices["total_rank"] == 2 * lora["total_rank"]
    # sqrt(2 (32 + 32)) is 11.3.
    assert [run["parameters"]["adapter"] for run in squares] == [6 * 11**2, 6 * 10**2]
    assert [run["total_rank"] for run in squares] == [6 * 11, 6 * 10]


@pytest.mark.slow
def test_the_table_has_the_parameters_that_lora_mini_trains(command, results):
    assert main(command(methods="lora,lora_mini:lora_a=8,lora_b=4")) == 0
    lora, mini = results()
    assert mini["total_rank"] == mini["budget"] == lora["total_rank"]
    assert mini["parameters"]["adapter"] == mini["parameters"]["held"] == 6 * 2 * (8 + 4)


@pytest.mark.slow
def test_of_sora_the_table_has_the_open_gates_and_what_was_trained(command, results):
    assert main(command(methods="sora:sparse_lambda_2=0.05")) == 0
    (run,) = results()
    assert 0 < run["total_rank"] < run["budget"] == 12
    assert run["parameters"]["held"] == 12 * 65
    assert run["parameters"]["adapter"] == run["total_rank"] * 65


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
def test_the_random_control_reaches_the_budget_with_other_modules(command, results, importance):
    schedule = f"tinit=3,deltaT=1,top_h=1,importance={importance}"
    methods = f"increlora:{schedule},increlora-random:{schedule}"
    assert main(command("--seeds", "2", methods=methods)) == 0
    ranks = {(r["config"]["method"], r["config"]["seed"]): list(r["ranks"].values()) for r in results()}
    assert {sum(of_a_run) for of_a_run in ranks.values()} == {12}
    chosen, random = sorted({method for method, _ in ranks}, key=len)
    assert ranks[random, 0] != ranks[random, 1]
    assert ranks[random, 0] != ranks[chosen, 0]


@pytest.mark.slow
def test_the_same_run_gives_the_same_numbers_again(command, results, tmp_path):
    told = {}
    for attempt in range(2):
        assert main(command(methods="increlora-random")) == 0
        (run,) = results()
        told[attempt] = {key: run[key] for key in ("id", "epochs", "test", "ranks")}
        (tmp_path / "runs.jsonl").unlink()
    assert told[0] == told[1]


@pytest.mark.slow
def test_a_decoder_without_a_padding_token_is_compared(command, decoder, results):
    assert (
        main(command("--targets", "all-linear", model=decoder, methods="lora,adalora,increlora,paper")) == 0
    )
    runs = results()
    assert [run["status"] for run in runs] == ["done"] * 4
    assert all(run["total_rank"] == run["budget"] == 2 * 14 for run in runs)
    assert not any("score" in name for run in runs for name in run["ranks"])


# Where a row's classifier attends to one token, query and key have no gradient, and the first step grows.
@pytest.mark.filterwarnings("ignore:.*no gradient has reached:UserWarning")
@pytest.mark.slow
def test_a_gguf_file_is_compared(command, gguf_file, results):
    assert main(command("--targets", "all-linear", model=gguf_file, methods="lora,increlora", epochs=1)) == 0
    assert [run["status"] for run in results()] == ["done"] * 2


@pytest.mark.slow
def test_precision_and_the_bases_dropout_make_another_run(command, results, capsys):
    assert main(command(methods="lora", epochs=1)) == 0
    assert main(command("--precision", "bfloat16", "--base-dropout", "0", methods="lora", epochs=1)) == 0
    first, second = results()
    assert (first["config"]["precision"], first["config"]["base_dropout"]) == ("float32", None)
    assert (second["config"]["precision"], second["config"]["base_dropout"]) == ("bfloat16", 0.0)
    assert first["id"] != second["id"]
    assert "8 tokens, bfloat16, dropout 0 in the base" in capsys.readouterr().out


def test_the_bases_dropout_is_replaced_wherever_its_configuration_has_one(encoder, reviews):
    base, task = BaseModel(encoder), read_task(reviews)

    def probabilities(given):
        model = base.classifier(task, 0, given)
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    assert probabilities(0.3) == {0.3}
    assert probabilities(None) == {BertConfig.from_pretrained(encoder).hidden_dropout_prob}


@pytest.mark.slow
def test_scores_are_learned_too(command, results, tmp_path):
    (tmp_path / "STS-B.tsv").write_text(lines(30, score=True))
    assert main(command(task=tmp_path / "STS-B.tsv", methods="lora")) == 0
    (run,) = results()
    assert set(run["epochs"][-1]) == {"pearson", "spearman"}
    assert run["test"] is None


@pytest.mark.slow
def test_every_method_tries_every_learning_rate_and_the_best_goes_on(command, results):
    assert main(command("--lr", "1e-5,0.02", "--seeds", "3")) == 0
    runs = results()
    assert len(runs) == 2 * (2 + 2)
    for method in ("lora", "increlora"):
        own = [run for run in runs if run["config"]["method"] == method]
        assert {run["config"]["lr"] for run in own if run["config"]["seed"] == 0} == {1e-5, 0.02}
        chosen = {run["config"]["lr"] for run in own if run["config"]["seed"] > 0}
        trials = [run for run in own if run["config"]["seed"] == 0]
        assert chosen == {best_lr(trials)}


@pytest.mark.slow
def test_growth_can_be_over_earlier_and_e_be_trained_faster(command, encoder, reviews):
    from increlora_rs.compare.training import _Trainer
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    (method,) = parse_methods("increlora:importance=gradient,growth_end=0.3,e_lr=10,target_modules=.*query")
    prepared = method.prepare(Setting(3, 100, 0, SETTING.shared))
    from peft import get_peft_model

    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(encoder), prepared.config)
    rows = [{"input_ids": [k % 9 + 3, 4], "attention_mask": [1, 1], "labels": k % 3} for k in range(100)]
    trainer = _Trainer(
        prepared.e_lr,
        model=model,
        args=TrainingArguments(
            output_dir=str(reviews),
            max_steps=100,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        callbacks=prepared.callbacks,
    )
    trainer.train()
    (callback,) = prepared.callbacks
    steps = callback.scheduler.history["step"]
    assert min(steps) > 10 and max(steps) <= 30
    assert callback.scheduler.total_rank == callback.scheduler.budget == 6
    named = {id(p): name for name, p in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            is_e = ".lora_E." in named[id(parameter)]
            assert group["initial_lr"] == pytest.approx(1e-2 if is_e else 1e-3)


@pytest.mark.slow
def test_a_failed_run_is_kept_and_trained_again_only_when_asked(command, results, monkeypatch, capsys):
    from increlora_rs.compare import session

    train = session.train

    def fails(method, *arguments):
        if method.name == "lora":
            raise RuntimeError("out of luck")
        return train(method, *arguments)

    monkeypatch.setattr(session, "train", fails)
    assert main(command()) == 1
    assert "1 runs failed" in capsys.readouterr().err
    assert [(run["status"], run["error"]) for run in results()] == [
        ("failed", "RuntimeError: out of luck"),
        ("done", None),
    ]
    monkeypatch.setattr(session, "train", train)
    assert main(command()) == 1
    assert len(results()) == 2
    assert main(command("--retry-failed")) == 0
    assert [run["status"] for run in results()] == ["failed", "done", "done"]
    assert main(command()) == 0


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(command, results, tmp_path):
    arguments = command("--seeds", "2")
    out = tmp_path / "runs.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "increlora_rs.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = results()
    assert 1 <= len(kept) < 4
    with open(out, "a") as file:
        file.write('{"id": "half a li')
    assert main(arguments) == 0
    runs = results()
    assert runs[: len(kept)] == kept
    assert len(runs) == len({run["id"] for run in runs}) == 4
    assert main(arguments) == 0
    assert results() == runs


def test_arguments_that_cannot_be_are_told_before_any_training(command, tmp_path, capsys):
    for more, told in [
        (["--trial-seeds", "2"], "--trial-seeds 2"),
        (["--methods", "lora-given"], "name that too"),
        (["--methods", "increlora:toph=2"], "'toph' is neither"),
        (["--epochs", "0"], "--epochs 0"),
        (["--r", "0.5"], "--r 0.5: PEFT's methods have whole ranks only"),
        (["--base-dropout", "1"], "--base-dropout 1"),
        (["--model", str(tmp_path / "none")], "none does not exist"),
        (["--task", str(tmp_path / "none")], "none does not exist"),
    ]:
        assert main(command(*more)) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists() or not (tmp_path / "runs.jsonl").read_text()


# Results and report.


def made_up(method, seed, accuracy, lr=0.1, r=2, status="done", ranks=(1, 3), task="RTE", **options):
    config = {
        "task": task,
        "data": "d",
        "model": "m",
        "method": method,
        "options": options,
        "r": r,
        "lr": lr,
        "seed": seed,
        "epochs": 1,
        "batch": 8,
        "max_length": 16,
        "precision": "float32",
        "base_dropout": None,
        "limit": None,
    }
    names = [f"encoder.layer.{k}.query" for k in range(len(ranks))]
    return {
        "id": run_id(config),
        "status": status,
        "error": None,
        "config": config,
        "epochs": [{"accuracy": accuracy}],
        "losses": [1.0 - accuracy],
        "test": {"accuracy": accuracy - 0.1},
        "parameters": {"adapter": 1000 * r, "held": 1000 * r, "head": 66},
        "ranks": dict(zip(names, ranks, strict=True)),
        "total_rank": sum(ranks),
        "budget": 2 * len(ranks),
        "seconds_a_step": 0.25,
        "seconds": 9.0,
    }


def write(path, runs):
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))


def test_the_report_gives_mean_and_spread_at_the_best_learning_rate(tmp_path, capsys):
    runs = [made_up("lora", seed, accuracy) for seed, accuracy in enumerate([0.5, 0.6, 0.7])]
    runs += [made_up("lora", 0, 0.3, lr=0.2)]
    # Better with seed 0 alone is better: only that seed tried both.
    runs += [made_up("increlora", 0, 0.7, lr=0.2), made_up("increlora", 0, 0.6)]
    runs += [made_up("increlora", seed, 0.8, lr=0.2) for seed in (1, 2)]
    write(tmp_path / "runs.jsonl", runs)
    assert main(["compare", "--report", "--out", str(tmp_path / "runs.jsonl")]) == 0
    assert "60.0 ± 10.0" in capsys.readouterr().out
    page = (tmp_path / "runs.md").read_text()
    lora, increlora = (line for line in page.splitlines() if line.startswith(("| lora |", "| increlora |")))
    assert (
        "| 0.1 of 2 | 3 | 2,000 | 2,000 | 4 | 60.0 ± 10.0 | 50.0 ± 10.0 | 0.400 ± 0.100 |  | 0.250 |" in lora
    )
    # Differences seed by seed: 0.2, 0.2, 0.1.
    assert "| 0.2 of 2 | 3 |" in increlora
    assert "76.7 ± 5.8 | 66.7 ± 5.8 | 0.233 ± 0.058 | 16.7 ± 5.8 |" in increlora
    drawn = sorted(tmp_path.glob("runs-RTE-*.png"))
    assert [file.stem.rsplit("-", 1)[1] for file in drawn] == ["parameters", "ranks"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.name in page for file in drawn)


def test_tasks_and_ranks_are_kept_apart():
    runs = [made_up("lora", 0, 0.5), made_up("lora", 0, 0.6, r=8), made_up("lora", 0, 0.7, task="CoLA")]
    rte, cola = summarise(runs)
    assert [(row.r, row.score.mean) for row in rte.rows] == [(2, 0.5), (8, 0.6)]
    assert [row.score.mean for row in cola.rows] == [0.7]
    assert rte.difference(rte.rows[0]) is None


def test_several_tasks_are_in_one_table_with_the_mean_difference(tmp_path, capsys):
    runs = [made_up("lora", seed, value) for seed, value in enumerate([0.5, 0.6])]
    runs += [made_up("lora", seed, value, task="CoLA") for seed, value in enumerate([0.3, 0.3])]
    runs += [made_up("increlora", seed, value) for seed, value in enumerate([0.6, 0.6])]
    runs += [made_up("increlora", seed, value, task="CoLA") for seed, value in enumerate([0.4, 0.4])]
    runs += [made_up("paper", 0, 0.2)]
    write(tmp_path / "runs.jsonl", runs)
    assert main(["compare", "--report", "--out", str(tmp_path / "runs.jsonl")]) == 0
    assert "vs LoRA" in capsys.readouterr().out
    page = (tmp_path / "runs.md").read_text()
    assert (tmp_path / "runs-overview.png").read_bytes().startswith(b"\x89PNG")
    assert "](runs-overview.png)" in page
    # RTE differs by 0.1 and 0, of deviation 0.0707: its error is 0.05, the mean's with CoLA's 0 is 0.025.
    assert "| increlora | 2 | 60.0 ± 0.0 | 40.0 ± 0.0 | +7.5 ± 2.5 | +7.5 ± 2.5 |" in page
    assert "| lora | 2 | 55.0 ± 7.1 | 30.0 ± 0.0 |  |  |" in page
    assert "| paper | 2 | 20.0 [1] |  | -30.0 | -30.0 |" in page


def test_a_report_can_be_of_some_methods(tmp_path, capsys):
    write(tmp_path / "runs.jsonl", [made_up(method, 0, 0.5) for method in ("lora", "paper", "increlora")])
    command = ["compare", "--report", "--out", str(tmp_path / "runs.jsonl"), "--methods"]
    assert main([*command, "increlora,lora"]) == 0
    page = (tmp_path / "runs.md").read_text()
    assert page.index("| increlora |") < page.index("| lora |") and "| paper |" not in page
    assert main([*command, "adalora"]) == 1
    assert "no run of 'adalora'" in capsys.readouterr().err


def test_runs_of_other_defaults_are_not_mixed():
    runs = [made_up("increlora", 0, 0.5, growth_end=0.6, add_r=1)]
    runs += [made_up("increlora", 0, 0.7, growth_end=0.1, add_r=1), made_up("lora", 0, 0.6)]
    (comparison,) = summarise(runs)
    assert {row.method: row.score.mean for row in comparison.rows} == {
        "increlora (growth_end=0.6)": 0.5,
        "increlora (growth_end=0.1)": 0.7,
        "lora": 0.6,
    }


def test_a_single_seed_has_no_spread():
    assert Spread.of([0.5]).text() == "50.0"
    assert Spread.of([0.5, 0.7]).deviation == pytest.approx(0.1 * 2**0.5)


def test_a_loss_that_a_run_lacks_is_left_out():
    old, new = made_up("lora", 0, 0.5), made_up("lora", 1, 0.5)
    del old["losses"]
    ((row,),) = (comparison.rows for comparison in summarise([old, new]))
    assert row.loss is None
    ((row,),) = (comparison.rows for comparison in summarise([new]))
    assert row.loss.text(2, 1.0) == "0.50"


def test_mean_ranks_are_those_of_all_seeds():
    ((row,),) = (
        comparison.rows
        for comparison in summarise(
            [made_up("increlora", 0, 0.5), made_up("increlora", 1, 0.5, ranks=(2, 2))]
        )
    )
    assert list(row.ranks().values()) == [1.5, 2.5]


def test_a_failed_trial_is_no_best_and_is_counted():
    runs = [made_up("lora", 0, 0.9, lr=0.2, status="failed"), made_up("lora", 0, 0.5)]
    assert best_lr(runs) == 0.1
    ((row,),) = (comparison.rows for comparison in summarise(runs))
    assert (row.lr, row.failed, row.tried) == (0.1, 1, [0.1, 0.2])


def test_of_equal_learning_rates_the_lower_one_is_taken():
    assert best_lr([made_up("lora", 0, 0.5, lr=0.2), made_up("lora", 0, 0.5, lr=0.1)]) == 0.1
    assert best_lr([made_up("lora", 0, 0.5, status="failed")]) is None


def test_results_without_a_good_run_are_told(tmp_path, capsys):
    write(tmp_path / "runs.jsonl", [made_up("lora", 0, 0.5, status="failed")])
    assert main(["compare", "--report", "--out", str(tmp_path / "runs.jsonl")]) == 1
    assert "none ended well" in capsys.readouterr().err
    assert main(["compare", "--report", "--out", str(tmp_path / "nothing.jsonl")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_cut_line_at_the_end_is_dropped_and_one_in_the_middle_told(tmp_path):
    path, run = tmp_path / "runs.jsonl", made_up("lora", 0, 0.5)
    write(path, [run])
    whole = path.read_text()
    path.write_text(whole + '{"id": "cut')
    assert read_results(path) == [run]
    with Results(path) as results:
        assert results.find(run["id"]) == run
        results.append(made_up("lora", 1, 0.6))
    assert [len(line) > 50 for line in path.read_text().splitlines()] == [True, True]
    path.write_text('{"id": "cut\n' + whole)
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_results(path)


@pytest.mark.parametrize("lacks", ["status", "options", "everything"])
def test_a_file_of_something_else_is_told(tmp_path, lacks):
    other = json.loads(json.dumps(made_up("lora", 0, 0.5)))
    other.pop(lacks, None)
    other["config"].pop(lacks, None)
    if lacks == "everything":
        other = [1]
    (tmp_path / "runs.jsonl").write_text(json.dumps(other) + "\n")
    for read in (read_results, Results):
        with pytest.raises(ValueError, match="line 1 is no run"):
            read(tmp_path / "runs.jsonl")


def test_two_comparisons_cannot_write_to_one_file(tmp_path):
    with Results(tmp_path / "runs.jsonl"), pytest.raises(ValueError, match="another comparison"):
        Results(tmp_path / "runs.jsonl")
