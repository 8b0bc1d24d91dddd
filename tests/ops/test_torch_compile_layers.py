"""Embeddings and convolutions in compiled and exported graphs: as without them, one compilation for all
ranks."""

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach
from paths import assert_same_growth, assert_same_training
from probes import armed_probe
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

STEPS = 30
TARGETS = ["words", "narrow", "wide", "square", "head"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Reader(nn.Module):
    """Ids through an embedding and convolutions of every way to pad."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 8, padding_idx=0)
        self.narrow = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.wide = nn.Conv1d(6, 6, 3, padding="same", padding_mode="circular", dilation=2)
        self.square = nn.Conv2d(1, 4, (3, 2), padding="same")
        self.head = nn.Linear(4, 5)

    def forward(self, ids):
        x = torch.tanh(self.narrow(self.words(ids).transpose(1, 2)))
        x = torch.tanh(self.square(self.wide(x).unsqueeze(1)))
        return self.head(x.mean((2, 3)))


def adapted(make=growing, **options):
    torch.manual_seed(3)
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "top_h": 2, "deltaT": 3, "tinit": 3}
    return peft.get_peft_model(Reader(), make(**(config | options)))


def batch(t):
    ids = torch.randint(13, (4, 12), generator=torch.Generator().manual_seed(t))
    return ids, torch.sin(ids[:, :5].float())


def train(model, net):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    torch.manual_seed(5)
    for t in range(STEPS):
        ids, y = batch(t)
        nn.functional.mse_loss(net(ids), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank == scheduler.budget
    return scheduler.history, [p.detach().clone() for p in parameters]


FORMS = [
    {},
    {"lora_dropout": 0.25},
    {"scaling": "rank", "use_rslora": True},
    {"make": IncreLoraConfig.paper},
    {"importance": "gradient", "lora_dropout": 0.25},
    {"importance": "gradient"},
    {"use_dora": True, "lora_dropout": 0.25},
]


@pytest.mark.parametrize(
    "options", FORMS, ids=["default", "dropout", "scale by rank", "paper", "sketch", "directions", "dora"]
)
def test_one_compilation_serves_a_whole_training(options):
    history, expected = train(*[adapted(**options)] * 2)
    model = adapted(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled_history, got = train(model, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert_same_growth(compiled_history.tolist(), history.tolist())
    assert_same_training(got, expected)


def test_a_training_from_nothing_agrees_with_eager_mode():
    history, expected = train(*[adapted(init_r=0)] * 2)
    model = adapted(init_r=0)
    got, parameters = train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_same_growth(got.tolist(), history.tolist())
    assert_same_training(parameters, expected)


@pytest.mark.slow
def test_inductor_agrees():
    _, expected = train(*[adapted()] * 2)
    model = adapted()
    _, got = train(model, torch.compile(model, fullgraph=True))
    assert_same_training(got, expected)


def test_gradients_and_importance_are_those_of_eager_mode():
    found = []
    for compiled in (False, True):
        model = adapted(init_lora_weights=False, importance="sensitivity")
        attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=STEPS)
        probe = armed_probe(model)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        net(batch(0)[0]).square().sum().backward()
        importance = probe.gauge.total.clone()
        assert (importance > 0).all()
        found.append([importance, *[p.grad for p in model.parameters() if p.requires_grad]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12)], ids=["one sequence", "a batch"])
def test_a_gradient_reaches_the_input_of_a_convolution(shape):
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv1d(8, 6, 3, stride=2, padding=1, padding_mode="reflect"))
        config = growing(target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_autocast_inside_the_compiled_function_is_obeyed():
    model = adapted(init_lora_weights=False)

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    ids, _ = batch(0)
    expected = step(ids)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(ids)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_gives_the_same_outputs(strict):
    model = adapted(init_lora_weights=False).eval()
    ids, _ = batch(0)
    program = torch.export.export(model, (ids,), strict=strict)
    torch.testing.assert_close(program.module()(ids), model(ids))
