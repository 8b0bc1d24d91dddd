"""Every optimizer of docs/optimizers.md is run over several growths, and does what the page says of it."""

import ast
import copy
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from growing import growing
from increlora_rs import attach
from increlora_rs.training import form as form_module
from increlora_rs.training import modules as adapted
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
STEPS = 30
# The adapter's A and B have fewer than 4,096 numbers at the narrow width, and pass that at the wide one.
NARROW, WIDE = 32, 512
# Those that look at it.
QUANTISING = ("bitsandbytes.", "torchao.", "galore_torch.")


def rows(title):
    """{name: outcome} of the table under a title, several names to a row."""
    chapter = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in re.findall(r"^\| `.*$", chapter, re.MULTILINE)]
    return {name: outcome for first, outcome, *_ in cells for name in re.findall(r"`([^`]+)`", first)}


BY_CLASS = rows("By class")
BY_NAME = rows("By the `optim` of TrainingArguments")
OUTCOMES = {"kept", "true start", "anew", "anew from 4,096 numbers", "refused", "own error", "not run"}


def make_model(width):
    torch.manual_seed(0)
    config = growing(r=9, init_r=2, lora_alpha=9, target_modules=["0"], tinit=3, deltaT=3, top_h=1)
    return get_peft_model(nn.Sequential(nn.Linear(width, width)), config)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def uncompiled(monkeypatch):
    # torchao compiles each step anew for each shape.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def growths(monkeypatch):
    """Of each growth of a parameter: its new shape, along which dimension, its state before and after."""
    seen = []
    follow = form_module.resize_state

    def resize_state(optimizer, parameter, dim, *rest):
        def state():
            # ZeroRedundancyOptimizer's own holds nothing.
            holder = getattr(optimizer, "optim", optimizer)
            items = holder.state.get(parameter, {}).items()
            return {key: value.clone() if type(value) is torch.Tensor else value for key, value in items}

        before = state()
        follow(optimizer, parameter, dim, *rest)
        seen.append((list(parameter.shape), dim, before, state()))

    monkeypatch.setattr(form_module, "resize_state", resize_state)
    return seen


def train(model, optimizer, steps=STEPS):
    """Trains; gives the scheduler and the warnings of this package."""
    width = model.base_model.model[0].in_features
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = attach(model, optimizer, total_steps=steps)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for step in range(steps):
            x = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
            (model(x) - x.roll(1, 1)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return scheduler, [str(w.message) for w in caught if "anew" in str(w.message)]


def outcome_of_growths(growths, told):
    """What was done with the state: "kept", "true start" or "anew"."""
    started = False
    for shape, dim, before, after in growths:
        assert told or not before or after, "what is dropped is told"
        for key, new in after.items():
            old = before[key]
            assert type(new) is type(old)
            if not isinstance(new, torch.Tensor) or new.shape == old.shape:
                continue
            if new.dim() == 3:  # several, one after the other
                new, old = new[0], old[0]
            if new.dim() == 1:  # one that lies flat
                was = old.numel() * shape[dim] // new.numel()
                new, old = new.view(shape), old.view([*shape[:dim], was, *shape[dim + 1 :]])
            size = old.shape[dim]
            assert torch.equal(new.narrow(dim, 0, size), old), key
            started |= bool(new.narrow(dim, size, new.shape[dim] - size).any())
    return "anew" if told else "true start" if started else "kept"


def outcome(make, growths, width=NARROW):
    """Of ``make(model)``, an optimizer, over several growths."""
    model = make_model(width)
    optimizer = make(model)
    if isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__name__ == "SparseAdam":
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            train(model, optimizer)
        return "own error"
    try:
        scheduler, told = train(model, optimizer)
    except (ValueError, TypeError) as error:
        if not str(error).startswith(("optimizer: ", "model: ")):
            raise
        return "refused"
    assert scheduler.total_rank == scheduler.budget
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    assert all(torch.isfinite(p).all() for p in trainable(model))
    return outcome_of_growths(growths, told)


def outcome_at_both_sizes(make, growths):
    narrow = outcome(make, growths)
    if narrow == "refused" or not type(make(make_model(NARROW))).__module__.startswith(QUANTISING):
        return narrow
    growths.clear()
    wide = outcome(make, growths, WIDE)
    return f"{wide} from 4,096 numbers" if (narrow, wide) == ("kept", "anew") else wide


def maker(call):
    """From "package.Class(argument=1)": what makes the optimizer."""
    expression = ast.parse(call, mode="eval").body
    arguments = {}
    if isinstance(expression, ast.Call):
        arguments = {word.arg: ast.literal_eval(word.value) for word in expression.keywords}
        expression = expression.func
    path, _, name = ast.unparse(expression).rpartition(".")
    module = pytest.importorskip(path, reason=f"{path} is not installed")
    cls = getattr(module, name)

    def make(model):
        if name == "CPUOffloadOptimizer":
            return cls.__new__(cls)  # its constructor wants a GPU
        if name == "Adam_mini":
            return cls(named_parameters=model.named_parameters(), lr=1e-3, dim=64, n_heads=4)
        if name == "Lomo":
            return cls(model)
        if name == "ScheduleFreeWrapper":
            return cls(torch.optim.RMSprop(trainable(model), lr=1e-3))
        if name == "ZeroRedundancyOptimizer":
            return cls(trainable(model), torch.optim.AdamW, lr=1e-3, **arguments)
        if name == "Lookahead":
            return cls(torch.optim.AdamW(trainable(model), lr=1e-3))
        if name == "PostLocalSGDOptimizer":
            averagers = importlib.import_module("torch.distributed.algorithms.model_averaging.averagers")
            averager = averagers.PeriodicModelAverager(period=4, warmup_steps=1)
            return cls(torch.optim.AdamW(trainable(model), lr=1e-3), averager)
        if name.startswith("create_lora"):
            rest = {"loraplus_lr_ratio": 4.0, "optimizer_cls": torch.optim.AdamW}
            return cls(model, lr=1e-3, **(rest if name == "create_loraplus_optimizer" else arguments))
        if name == "create_riemannian_optimizer":
            return cls(model, torch.optim.AdamW, lr=1e-3)
        return cls(trainable(model), **({"lr": 1e-3} | arguments))

    return make


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", BY_CLASS)
def test_an_optimizer_does_at_a_growth_what_its_row_says(call, growths, request):
    if call.startswith("torch.distributed."):
        request.getfixturevalue("process_group")
    assert outcome_at_both_sizes(maker(call), growths) == BY_CLASS[call]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_an_optimizer_of_trainer_does_at_a_growth_what_its_row_says(name, growths, tmp_path):
    if BY_NAME[name] == "not run":
        pytest.skip(f"{name} runs on hardware, or with a package, that the tests do not have")
    targets = "all-linear" if name.startswith(("galore", "apollo")) else None
    settings = TrainingArguments(
        str(tmp_path),
        optim=name,
        use_cpu=True,
        report_to=[],
        learning_rate=1e-3,
        optim_target_modules=targets,
    )

    def make(model):
        try:
            cls, arguments = Trainer.get_optimizer_cls_and_kwargs(settings, model)
            if cls.__name__ == "AdaLomo" and not torch.cuda.is_available():
                pytest.skip("its constructor wants a GPU")
        except (ImportError, ValueError) as error:
            if "install" not in str(error):
                raise
            pytest.skip(str(error))
        if cls.__name__ == "StableAdamW":
            arguments["triton"] = False
        if not {"params", "model", "optimizer_dict"} & set(arguments):
            arguments["params"] = trainable(model)
        return cls(**arguments)

    assert outcome_at_both_sizes(make, growths) == BY_NAME[name]


def test_the_page_has_every_optimizer_of_torch():
    named = {ast.unparse(ast.parse(call)).split("(")[0] for call in BY_CLASS}
    classes = {
        f"torch.optim.{name}"
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert classes <= named


def test_the_page_has_every_optim_of_trainingarguments():
    assert set(BY_NAME) == {name.value for name in OptimizerNames}


def test_every_row_has_an_outcome_that_is_explained():
    assert set(BY_CLASS.values()) | set(BY_NAME.values()) == OUTCOMES
    assert all(f"**{outcome}**" in PAGE for outcome in OUTCOMES)


# Bytes of 8-bit optimizers.


def bytes_of(value):
    if type(value) is torch.Tensor:
        return value.nbytes if value.dim() else 0
    codes = [getattr(value, name) for name in getattr(value, "tensor_attrs", ()) if name != "qmap"]
    return sum(code.nbytes for code in codes)


BYTES = dict(re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \|$", PAGE, re.MULTILINE))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("call", BYTES)
def test_the_bytes_of_state_are_those_of_the_page(call):
    config = growing(r=16, lora_alpha=16, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(1024, 1024)), config)
    optimizer = maker(call)(model)
    train(model, optimizer, 12)
    states = [item for state in optimizer.state.values() for item in state.items()]
    size = sum(bytes_of(value) for key, value in states if not key.startswith("qmap"))
    assert f"{size:,}" == BYTES[call]


def test_a_bound_of_its_own_is_followed():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model(NARROW)
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-3, min_8bit_size=200)
    train(model, optimizer)
    dtypes = {p.numel() >= 200: optimizer.state[p]["state1"].dtype for p in trainable(model)}
    assert dtypes == {True: torch.uint8, False: torch.float32}


# Optimizers that keep copies of the weights.

SCHEDULE_FREE = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_a_growth_leaves_the_weights_for_evaluation_as_they_were(name, scaling):
    config = growing(r=9, init_r=2, lora_alpha=9, target_modules=["0"], scaling=scaling)
    model = get_peft_model(nn.Sequential(nn.Linear(NARROW, NARROW)), config)
    optimizer = maker(f"schedulefree.{name}")(model)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.train()
    x = torch.randn(8, NARROW)
    for _ in range(9):
        (model(x) - x.roll(1, 1)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    before = model(x).detach()
    optimizer.train()
    (module,) = adapted.adapted_modules(model, "default")
    module.start()
    module.state = form_module.InPlace([module], optimizer)
    module.grow(3, torch.Generator().manual_seed(0))
    module.follow(9)
    optimizer.eval()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_copies_of_the_weights_warm_up_with_their_rows(name):
    """Else a row that is held back would be evaluated on the other side of where it started."""
    model = make_model(NARROW)
    optimizer = maker(f"schedulefree.{name}")(model)
    scheduler = attach(model, optimizer, total_steps=STEPS, lr_warmup_steps=20, lr_schedule="follow")
    optimizer.train()
    x = torch.randn(8, NARROW)
    while scheduler.total_rank == 2:
        (model(x) - x.roll(1, 1)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (module,) = adapted.adapted_modules(model, "default")
    state = optimizer.state[module.factors[2]]
    born = module.factors[2].detach()[-1].clone()
    (model(x) - x.roll(1, 1)).pow(2).mean().backward()
    optimizer.step()
    # The warm-up's first step of a row has the rate 0.
    assert torch.equal(state["z"][-1], born)
    assert torch.equal(module.factors[2].detach()[-1], born)


RESUMED = ["torch.optim.AdamW", "torch.optim.Rprop", "torch.optim.ASGD", "schedulefree.AdamWScheduleFree"]


@pytest.mark.parametrize("call", RESUMED)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(call):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            x = torch.randn(8, NARROW, generator=torch.Generator().manual_seed(step))
            (model(x) - x.roll(1, 1)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin():
        model = make_model(NARROW)
        optimizer = maker(call)(model)
        attach(model, optimizer, total_steps=STEPS)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return model, optimizer

    whole, optimizer = begin()
    steps(whole, optimizer, 0, STEPS)
    half, optimizer = begin()
    steps(half, optimizer, 0, 10)
    weights, state = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, optimizer = begin()
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, 10, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(trainable(whole), trainable(resumed), strict=True))
