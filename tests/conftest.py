"""Tiny models for every test, built from configurations: no hub, no files; adapters of unequal ranks."""

import json
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a process a core; before torch is imported, and for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from increlora_rs.training.fit import schedulers_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

# Not a second conftest.py: two modules of one name, and the classes here could not be pickled.
pytest_plugins = ["kernel_fixtures"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(12, 20)
        self.lin1 = nn.Linear(20, 6)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def seeded(build):
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = build().eval()
    torch.set_rng_state(state)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_plain():
    """Builds the two-layer model: lin0 12 to 20, lin1 20 to 6; the same weights at every call."""
    return lambda: seeded(Plain)


@pytest.fixture(scope="session")
def make_bert():
    """Builds a BERT classifier of 2 layers (or more), 3 labels; the same weights at every call."""

    def build(layers=2, hidden=32):
        config = BertConfig(
            vocab_size=99,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            num_labels=3,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return seeded(lambda: BertForSequenceClassification(config))

    return build


@pytest.fixture(scope="session")
def make_llama():
    """Builds a Llama of 2 layers; the same weights at every call."""

    def build():
        config = LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
        return seeded(lambda: LlamaForCausalLM(config))

    return build


@pytest.fixture
def plain_input():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def grow():
    """``grow(model, {name: rank})``: raises the ranks of the named modules (None: 1, 2, 3, 1, ... in
    model order), then fills A, B and E of all with numbers, so that outputs differ from the base."""

    def run(model, ranks=None, *, adapter_name="default", reserve=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layers = {short(name): layer for name, layer in adapted_layers(model, adapter_name).items()}
        if ranks is None:
            ranks = {
                name: min(1 + k % 3, layer.largest_rank) for k, (name, layer) in enumerate(layers.items())
            }
        for name, rank in ranks.items():
            missing = rank - layers[name].r[adapter_name]
            if missing > 0:
                layers[name].structure.grow(layers[name], adapter_name, missing, generator)
        for layer in layers.values():
            layer.structure.set_reserve(layer, adapter_name, reserve, generator)
            with torch.no_grad():
                a, b, e = layer.factors(adapter_name)
                a.normal_(0.0, 0.3, generator=generator)
                b.normal_(0.0, 0.3, generator=generator)
                e.uniform_(0.5, 1.5, generator=generator)
        return {name: layer.r[adapter_name] for name, layer in layers.items()}

    return run


@pytest.fixture
def train_bert(make_bert):
    """``train_bert(steps=12)``: a BERT whose ranks grew in a training, from 4 to a budget of 12 on 4
    modules, 2 of them at each of the steps 4, 6, 8 and 10. Gives model, optimizer, scheduler; given a model
    and an optimizer, goes on."""

    def run(steps=12, model=None, optimizer=None, **config):
        if model is None:
            torch.manual_seed(0)
            settings = {"r": 3, "target_modules": ["query", "value"], "tinit": 3, "deltaT": 2, "top_h": 2}
            model = peft.get_peft_model(make_bert(), growing(**(settings | config)))
        if optimizer is None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        running = schedulers_of(model)
        scheduler = running[0] if running else attach(model, optimizer, total_steps=12)
        while scheduler.step < steps:
            generator = torch.Generator().manual_seed(scheduler.step)
            ids = torch.randint(5, 99, (4, 8), generator=generator)
            model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer, scheduler

    return run


@pytest.fixture
def group_of_one(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Loads adapters on a saved BERT classifier, or on a whole module in a file; a line of JSON in, a line out.
_WORKER = """
import json, sys
{imports}
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
for line in sys.stdin:
    request = json.loads(line)
    if request["base"].endswith(".pt"):
        base = torch.load(request["base"], weights_only=False)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(request["base"])
    dtype = getattr(torch, request["dtype"])
    model = PeftModel.from_pretrained(base.to(dtype), request["adapter"]).eval()
    answer = {{"classes": sorted({{type(m).__module__ for m in model.modules()}})}}
    x = torch.tensor(request["x"], dtype=torch.float64)
    with torch.no_grad():
        y = model(x.long() if request["integers"] else x.to(dtype))
        answer["logits"] = getattr(y, "logits", y).double().tolist()
    answer["knows_increlora"] = "increlora_rs" in sys.modules
    print("ANSWER" + json.dumps(answer), flush=True)
"""


def _worker(imports):
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(imports=imports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def ask(base, adapter, x, dtype="float32"):
            request = {"base": str(base), "adapter": str(adapter), "dtype": dtype}
            request |= {"x": x.tolist(), "integers": not x.is_floating_point()}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("ANSWER"):
                    return json.loads(line.removeprefix("ANSWER"))
            errors.seek(0)
            raise AssertionError(f"the process that loads adapters died: {errors.read()[-3000:]}")

        yield ask
        process.stdin.close()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def plain_peft():
    """``plain_peft(base, adapter_dir, x)``: what a process that never imports increlora_rs gets from the
    adapter, on a saved classifier or on a module in a file ``.pt``."""
    yield from _worker("")


@pytest.fixture(scope="session")
def new_process():
    """``new_process(base, adapter_dir, x)``: what a new process that imports increlora_rs gets."""
    yield from _worker("import increlora_rs")


@pytest.fixture(scope="session")
def bert_dir(make_bert, tmp_path_factory):
    """The BERT classifier of ``make_bert()``, saved."""
    path = tmp_path_factory.mktemp("bert")
    make_bert().save_pretrained(path)
    return path
