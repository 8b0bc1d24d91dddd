"""The scripts in ``examples``, each run for real in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import increlora_rs
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHED = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu"]
LAUNCHED += ["--mixed_precision", "no", "--dynamo_backend", "no"]

# What each needs beside what the tests need in any case.
SCRIPTS = {
    "accelerate_loop": ([], LAUNCHED),
    "dpo": (["trl"], []),
    "lightning_loop": (["pytorch_lightning"], []),
    "sentence_embeddings": (["sentence_transformers", "datasets"], []),
    "seq2seq_t5": ([], []),
    "sft": (["trl"], []),
}


def run(script, out, launcher):
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{script}.py"), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    # finetune.py takes a model and a file: test_cli.py runs it. tiny.py is a module of the others.
    assert scripts - {"finetune", "tiny"} == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_keep_to_the_budget_and_the_adapter_loads(script, tmp_path):
    packages, launcher = SCRIPTS[script]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = run(script, tmp_path / "adapter", launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    said = re.findall(r"parameters (\d+) of (\d+)", done.stdout)
    assert len(said) == 1
    spent, budget = map(int, said[0])
    assert 0.9 * budget < spent <= budget
    losses = [float(loss) for loss in re.findall(r"'?loss'?:? '?([\d.]+|nan)", done.stdout)]
    assert all(loss < 20.0 for loss in losses)
    table = increlora_rs.rank_table(tmp_path / "adapter")
    assert (table.parameters, table.budget) == (spent, budget)
