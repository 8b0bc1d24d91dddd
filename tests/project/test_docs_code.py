"""The code in README and docs runs, on tiny models; what a block presupposes stands in PRELUDES."""

import os
import re
import subprocess
import sys
from pathlib import Path

import increlora_rs
import peft
import pytest
import pytorch_lightning
import torch
import transformers
import unets
from adapted_experts import adapted
from decoders import decoder
from growing import growing
from launches import WORKERS

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# Blocks that are files of their own, with the test that runs them.
FILES = {
    'title="train.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="train_sharded.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="train_sharded_adapter.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="train_fsdp1.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="train_trainer.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="train_deepspeed.py"': "test_the_script_for_several_processes_runs_in_two",
    'title="resume.py"': "test_the_script_that_resumes_a_distributed_checkpoint_runs",
}


class Block:
    """A block of code: its page, its number among the page's blocks that run, the line before its first."""

    def __init__(self, page, number, match, line):
        self.page, self.number, self.line = page, number, line
        self.language, self.code = match["language"], match["code"]

    def side(self, sign):
        """Of a diff, the lines before the change ("-") or after it ("+"), each where it stands."""
        if self.language != "diff":
            return self.code
        lines = self.code.splitlines(keepends=True)
        return "".join(line[1:] if line[0] in f" {sign}" else "\n" for line in lines if line.strip())

    def run(self, namespace, sign="+"):
        text = "\n" * self.line + self.side(sign)
        exec(compile(text, f"{self.page}", "exec"), namespace)


def blocks_of(path):
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] in ("python", "diff") and match["options"].strip() not in FILES:
            found.append(Block(path.name, len(found), match, text[: match.start("code")].count("\n")))
    return found


PAGES = {path.name: blocks_of(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
PAGES_WITH_CODE = [name for name, blocks in PAGES.items() if blocks]
DIFFS = [block for blocks in PAGES.values() for block in blocks if block.language == "diff"]


def examples(n=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (n, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def batches(n):
    rows = examples(4 * n)
    return [{k: torch.stack([row[k] for row in rows[4 * i : 4 * i + 4]]) for k in rows[0]} for i in range(n)]


def arguments():
    return transformers.TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def save_adapter(make_bert, **options):
    """A trained adapter in the folder ``adapter``."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}
    model = peft.get_peft_model(make_bert(), increlora_rs.IncreLoraConfig(**(settings | options)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = increlora_rs.attach(model, optimizer, total_steps=20)
    for batch in batches(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.detach()
    model.save_pretrained("adapter")


def trainer_names(make_bert, names):
    return {
        "base": make_bert(),
        "args": arguments(),
        "data": examples(),
        "Trainer": transformers.Trainer,
    }


def loop_names(make_bert, names):
    return {"base": make_bert(), "torch": torch, "total_steps": 12, "batches": batches(12)}


def quickstart_model(make_bert, names):
    make_bert().save_pretrained("my-model")
    return {"data": examples(48)}


def average_names(make_bert, names):
    config = growing(r=2, target_modules=["query", "value"], growth_end=0.6)
    return {"base": make_bert(), "config": config, "batches": batches(12)}


class Classifier(pytorch_lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(**batch).loss


def lightning_names(make_bert, names):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    options = {"accelerator": "cpu", "devices": 1} | dict.fromkeys(quiet, False)
    return {"base": make_bert(), "Classifier": Classifier, "loader": loader, "options": options}


def saved_adapter(make_bert, names):
    save_adapter(make_bert)
    return {"increlora_rs": increlora_rs}


def saved_llama_adapter(make_bert, names):
    """An adapter on a Llama, both saved."""
    decoder().save_pretrained("my-llama")
    config = increlora_rs.IncreLoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(decoder(), config).save_pretrained("llama_adapter")
    return {}


def saved_mixture_adapter(make_bert, names):
    adapted("Mixtral").save_pretrained("mixture_adapter")
    return {}


def unet_names(make_bert, names):
    unet = unets.unet()
    unet.add_adapter(growing(r=2, target_modules=["to_q", "to_v"]))
    return {"unet": unet, "fresh_unet": unets.unet()}


# What the block (page, number) takes for granted, given the names of the blocks before it.
PRELUDES = {
    ("README.md", 0): trainer_names,
    ("README.md", 1): lambda make_bert, names: {"optimizer": torch.optim.AdamW(names["model"].parameters())},
    ("README.md", 2): lambda make_bert, names: {"base": make_bert(), "peft": peft},
    ("quickstart.md", 0): quickstart_model,
    ("quickstart.md", 2): lambda make_bert, names: {"batches": batches(40)},
    ("from-lora.md", 0): trainer_names,
    ("from-adalora.md", 0): loop_names,
    ("adalora.md", 0): trainer_names,
    ("averages.md", 0): average_names,
    ("averages.md", 1): lambda make_bert, names: (
        trainer_names(make_bert, names) | {"model": peft.get_peft_model(make_bert(), names["config"])}
    ),
    ("averages.md", 2): average_names,
    ("averages.md", 3): lightning_names,
    ("choosing.md", 0): lambda make_bert, names: {
        "model": peft.get_peft_model(
            make_bert(), increlora_rs.IncreLoraConfig(r=8, target_modules=["query", "value"])
        )
    },
    ("export.md", 0): saved_adapter,
    ("export.md", 1): lambda make_bert, names: {"base": make_bert()},
    ("export.md", 5): saved_llama_adapter,
    ("export.md", 6): saved_mixture_adapter,
    ("export.md", 7): unet_names,
    ("export.md", 8): lambda make_bert, names: {"fresh_base": make_bert()},
    ("export.md", 9): lambda make_bert, names: {"another_base": make_bert()},
    ("troubleshooting.md", 0): lambda make_bert, names: {
        "base": make_bert(),
        "config": growing(r=2, target_modules=["query", "value"]),
        "increlora_rs": increlora_rs,
        "torch": torch,
    },
    ("troubleshooting.md", 1): lambda make_bert, names: {
        **saved_adapter(make_bert, names),
        "base": make_bert(),
        "PeftModel": peft.PeftModel,
    },
    ("troubleshooting.md", 2): lambda make_bert, names: {"batches": batches(1)},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pages_with_code_are_found():
    assert {"README.md", "quickstart.md", "from-lora.md", "export.md"} <= set(PAGES_WITH_CODE)


def test_preludes_are_of_blocks_that_exist():
    numbers = {(page, block.number) for page, blocks in PAGES.items() for block in blocks}
    assert set(PRELUDES) - numbers == set()


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, make_bert, folder):
    namespace = {"__name__": "docs"}
    for block in PAGES[page]:
        prelude = PRELUDES.get((page, block.number))
        if prelude is not None:
            namespace |= prelude(make_bert, namespace)
        block.run(namespace)
    assert set(PRODUCED.get(page, ())) <= {path.name for path in folder.iterdir()}


# What the code of a page writes.
PRODUCED = {
    "README.md": ["adapter", "lora", "ranks.png"],
    "quickstart.md": ["adapter", "lora", "ranks.png"],
    "averages.md": ["adapter", "averaged", "ema"],
    "export.md": [
        "adapter.gguf",
        "growing",
        "lora",
        "lora16",
        "lora2",
        "merged",
        "mixture_lora",
        "unet_lora",
    ],
}


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: block.page)
def test_the_script_before_a_change_runs_on_plain_peft(block, make_bert, folder):
    namespace = {"__name__": "docs"} | PRELUDES[block.page, block.number](make_bert, {})
    block.run(namespace, "-")
    assert type(namespace["config"]).__module__.startswith("peft.")


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: block.page)
def test_the_script_after_a_change_trains_within_the_budget(block, make_bert, folder):
    namespace = {"__name__": "docs"} | PRELUDES[block.page, block.number](make_bert, {})
    block.run(namespace)
    assert isinstance(namespace["config"], increlora_rs.IncreLoraConfig)
    assert increlora_rs.rank_table(namespace["model"]).total_rank == namespace["config"].r * 4


MY_PROJECT = """
import torch
from transformers import AutoModelForSequenceClassification


def build_model():
    return AutoModelForSequenceClassification.from_pretrained({model!r})


def batches(rank, steps):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        ids = torch.randint(5, 99, (4, 8), generator=generator)
        yield {{"input_ids": ids, "labels": ids[:, 0] % 3}}


def rows():
    return [{{k: v[0] for k, v in batch.items()}} for batch in batches(0, 64)]
"""
# What a script's project begins with on the CPU: accelerate offers FSDP on accelerators only, and DeepSpeed
# compiles a communication of its own for processes of one machine.
ON_THE_CPU = {
    "train_trainer.py": f"""
import sys
sys.path[:0] = {[str(WORKERS), str(WORKERS.parent)]!r}
import torch
from trainer_sharded import allow_on_the_cpu
allow_on_the_cpu()
torch.manual_seed(0)
""",
    "train_deepspeed.py": """
import deepspeed
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
""",
}


def script_of(text, name):
    (script,) = [m["code"] for m in BLOCK.finditer(text) if m["options"].strip() == f'title="{name}"']
    return script


def test_the_script_that_resumes_a_distributed_checkpoint_runs(bert_dir, tmp_path):
    text = (ROOT / "docs" / "distributed.md").read_text()
    (tmp_path / "resume.py").write_text(script_of(text, "resume.py"))
    (tmp_path / "my_project.py").write_text(MY_PROJECT.format(model=str(bert_dir)))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:increlora_rs", "resume.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "train_sharded.py",
        "train_sharded_adapter.py",
        "train_fsdp1.py",
        "train_trainer.py",
        "train_deepspeed.py",
    ],
)
def test_the_script_for_several_processes_runs_in_two(script, bert_dir, tmp_path):
    if script == "train_deepspeed.py":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    text = (ROOT / "docs" / "distributed.md").read_text()
    (tmp_path / script).write_text(script_of(text, script))
    project = ON_THE_CPU.get(script, "") + MY_PROJECT.format(model=str(bert_dir))
    (tmp_path / "my_project.py").write_text(project)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, script],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert increlora_rs.rank_table(tmp_path / "adapter").total_rank == 16


@pytest.mark.slow
def test_the_quick_starts_script_is_started_by_accelerate_in_two_processes(bert_dir, tmp_path):
    page = (ROOT / "docs" / "quickstart.md").read_text()
    script = next(m["code"] for m in BLOCK.finditer(page) if "trainer.train()" in m["code"])
    seen = "import torch.distributed\nassert torch.distributed.get_world_size() == 2\n"
    script = script.replace('"my-model"', repr(str(bert_dir))) + seen
    (tmp_path / "train.py").write_text(f"from my_project import rows\n\ndata = rows()\n{script}")
    (tmp_path / "my_project.py").write_text(MY_PROJECT.format(model=str(bert_dir)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    # For processes on a CPU alone accelerate asks for mpirun; so it takes torchrun.
    command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, "--main_process_port", "0", "train.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert increlora_rs.rank_table(tmp_path / "adapter").total_rank == 16
