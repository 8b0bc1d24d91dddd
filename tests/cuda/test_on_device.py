"""Whole trainings on a device: what a user does with Trainer, by hand, compiled, resumed."""

import copy
import shutil
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, attach, growth_history
from rows import Rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 24
TARGETS = ["query", "value", "intermediate.dense"]
FORMS = {
    "default": {},
    "sensitivity": {"importance": "sensitivity", "orth_reg_weight": 0.1},
    "svd": {"init_lora_weights": "svd", "importance": "sensitivity"},
}


@pytest.fixture
def make_trainer(make_bert, tmp_path):
    """Builds a Trainer of 24 steps on a tiny BERT on the device, its ranks to grow from 1 to 3."""

    def build(form="default", dtype=torch.float32, **arguments):
        torch.manual_seed(4)
        settings = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 8, "lora_dropout": 0.1}
        schedule = {"target_modules": TARGETS, "tinit": 4, "deltaT": 4, "top_h": 4}
        config = growing(**(settings | schedule | FORMS[form]))
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "warmup_steps": 3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 11,
        }
        return Trainer(
            model=peft.get_peft_model(make_bert().to(dtype), config),
            args=TrainingArguments(**(defaults | arguments)),
            train_dataset=Rows(),
            callbacks=[IncreLoraCallback()],
        )

    return build


def trained(trainer, **options):
    trainer.train(**options)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def ranks_of(weights):
    return {name: value.shape[0] for name, value in weights.items() if "lora_E" in name}


# Of Adafactor, whose factors cannot grow.
@pytest.mark.filterwarnings("ignore:the state .* cannot follow")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"fp16": True},
        {"gradient_checkpointing": True, "bf16": True},
        {"gradient_accumulation_steps": 2},
        {"optim": "adamw_torch", "bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda arguments: ",".join(arguments) or "float32",
)
def test_trainer_grows_to_the_budget(make_trainer, arguments, form):
    trainer = make_trainer(form, **arguments)
    weights = trained(trainer)
    ranks = ranks_of(weights)
    assert sum(ranks.values()) == 3 * len(ranks)
    for name, value in weights.items():
        assert value.device.type == "cuda" and value.isfinite().all(), name
    scores = growth_history(trainer.model).scores
    assert scores and all(min(step) > 0.0 for step in scores)


def test_a_bfloat16_model_trains(make_trainer):
    weights = trained(make_trainer(dtype=torch.bfloat16, bf16=True))
    assert sum(ranks_of(weights).values()) == 18
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_training_is_the_one_without_a_break(make_trainer, form):
    whole = trained(make_trainer(form, save_strategy="steps", save_steps=10))
    checkpoint = next(Path(make_trainer(form).args.output_dir).glob("checkpoint-10"))
    resumed = trained(make_trainer(form), resume_from_checkpoint=str(checkpoint))
    assert ranks_of(resumed) == ranks_of(whole)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
    shutil.rmtree(checkpoint.parent)


def test_a_saved_adapter_gives_the_same_logits(make_trainer, make_bert, tmp_path):
    trainer = make_trainer()
    trained(trainer)
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").cuda().eval()
    ids = torch.randint(5, 99, (4, 8), device="cuda")
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


def stack(p=0.0, form="default", width=64):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, 96), nn.Tanh(), nn.Linear(96, 48))
    config = growing(r=4, lora_dropout=p, target_modules=["0", "2"], tinit=2, deltaT=3, **FORMS[form])
    return peft.get_peft_model(base, config).cuda().train()


def optimizer_of(model, make=torch.optim.AdamW, **options):
    return make([q for q in model.parameters() if q.requires_grad], lr=1e-2, **options)


def batch(width=64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(128, n, generator=generator).cuda() for n in (width, 48))


def steps(model, optimizer, count=STEPS, net=None, total=STEPS):
    """Trains; gives ranks and parameters."""
    net = model if net is None else net
    scheduler = attach(model, optimizer, total_steps=total)
    x, target = batch()
    for _ in range(count):
        (net(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = scheduler.ranks
    scheduler.detach()
    return ranks, [q.detach().clone() for q in model.parameters() if q.requires_grad]


@pytest.mark.filterwarnings("ignore:the state .* cannot follow")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"capturable": True}),
        (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adafactor, {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__,
)
def test_an_optimizer_of_the_device_follows_growth(make, options, form):
    ranks, parameters = steps(model := stack(form=form), optimizer_of(model, make, **options))
    assert sum(ranks.values()) == 8
    assert all(parameter.isfinite().all() for parameter in parameters)


def test_all_kinds_of_adamw_end_alike():
    ends = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        ends.append(steps(model := stack(), optimizer_of(model, **options)))
    for ranks, parameters in ends[1:]:
        assert ranks == ends[0][0]
        for parameter, first in zip(parameters, ends[0][1], strict=True):
            torch.testing.assert_close(parameter, first, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_without_growth_does_not_wait_for_the_device(form):
    model = stack(p=0.1, form=form)
    optimizer = optimizer_of(model, fused=True)
    scheduler = attach(model, optimizer, total_steps=400)
    x, target = batch()
    events = 0
    for _ in range(60):
        scheduled = scheduler.schedule.is_event(scheduler.step + 1)
        # Without a size that is new, the allocator does not ask the driver.
        torch.cuda.set_sync_debug_mode("default" if scheduled or scheduler.step < 3 else "error")
        try:
            (model(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        events += scheduled
    assert events


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="its compiler keeps the first size of a parameter that grows"
)
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled_it_trains_as_it_does_uncompiled(form):
    torch._dynamo.reset()
    ranks, want = steps(model := stack(form=form), optimizer_of(model))
    model = stack(form=form)
    got_ranks, got = steps(model, optimizer_of(model), net=torch.compile(model))
    assert got_ranks == ranks
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-4)


def test_forward_and_backward_can_be_captured_in_a_graph():
    model = stack(form="sensitivity")
    parameters = [q for q in model.parameters() if q.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0.0, 0.2)
    x, target = batch()

    def gradients():
        return torch.autograd.grad((model(x) - target).square().mean(), parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients()
    graph.replay()
    torch.cuda.synchronize()
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", FORMS)
def test_ddp_over_nccl_of_one_process_is_the_training_without(process_group, form):
    ranks, want = steps(model := stack(form=form), optimizer_of(model))
    model = stack(form=form)
    got_ranks, got = steps(model, optimizer_of(model), net=DistributedDataParallel(model))
    assert got_ranks == ranks
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_model_is_the_one_of_the_cpu(make_llama, grow, dtype):
    model = peft.get_peft_model(make_llama(), growing(r=3, target_modules="all-linear", lora_alpha=6))
    grow(model)
    ids = torch.randint(0, 99, (2, 7))
    model = model.to(dtype)
    there = copy.deepcopy(model).cuda()
    outputs = []
    for net, device in ((model, "cpu"), (there, "cuda")):
        out = net(input_ids=ids.to(device), labels=ids.to(device))
        out.loss.backward()
        gradients = {n: p.grad.double().cpu() for n, p in net.named_parameters() if p.grad is not None}
        outputs.append((out.logits.detach().double().cpu(), gradients))
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    (want, wanted), (got, gradients) = outputs
    assert (got - want).norm() < tolerance * want.norm()
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (gradients[name] - value).norm() < 3 * tolerance * value.norm() + 1e-9, name


def test_the_layers_take_fewer_kernels_than_loras():
    # Not at the top: the other tests run without the folder.
    from benches.device import table
    from benches.methods import FROZEN, LORA, OURS
    from benches.sizes import LayerCase

    kernels = Counter()
    for *_, method, _, count, _, _ in table((LayerCase((768, 768), 512, 8),)).rows:
        kernels[method] += float(count)
    assert 0.0 < kernels[FROZEN] < kernels[OURS] < kernels[LORA]
