"""torch.compile and torch.export: the numbers of eager mode, one compilation for all ranks."""

import copy
import io

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, attach
from launches import torchrun
from paths import assert_near, assert_same_growth, assert_same_training
from probes import armed_probe
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

STEPS = 40


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stack(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.inner = nn.Sequential(
            nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 11), nn.Tanh(), nn.Linear(11, 6)
        )

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)


def adapted(make=growing, checkpointed=False, **options):
    torch.manual_seed(3)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2", "4"], "top_h": 1, "deltaT": 5}
    return peft.get_peft_model(Stack(checkpointed), make(**(config | options)))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def batch(t):
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(t))
    return x, torch.sin(2 * x[:, :6])


def train(model, compiled=None, steps=STEPS, evaluate=False):
    """Trains by ``compiled`` (None: as it is); what came of it."""
    net = model if compiled is None else compiled
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=steps)
    torch.manual_seed(5)
    evaluated = []
    for t in range(steps):
        x, y = batch(t)
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            net.eval()
            with torch.no_grad():
                evaluated.append(net(x))
            net.train()
    return {
        "parameters": [p.detach().clone() for p in model.parameters() if p.requires_grad],
        "history": scheduler.history.tolist(),
        "total_rank": scheduler.total_rank,
        "budget": scheduler.budget,
        "evaluated": evaluated,
    }


def compile_counting(model, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


FORMS = {
    "LoRA's": (growing, {}),
    "LoRA's with dropout": (growing, {"lora_dropout": 0.2}),
    "the paper's": (IncreLoraConfig.paper, {}),
    "the paper's with dropout": (IncreLoraConfig.paper, {"lora_dropout": 0.2}),
    "rsLoRA's scale by rank": (growing, {"scaling": "rank", "use_rslora": True}),
    "LoRA's by the sensitivity": (growing, {"importance": "sensitivity"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_compilation_serves_a_whole_training_and_agrees_with_eager_mode(form):
    make, options = FORMS[form]
    expected = train(adapted(make, **options))
    model = adapted(make, **options)
    compiled, counter = compile_counting(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = train(model, compiled)
    assert counter.frame_count == 1
    assert len(got["history"]) >= 4
    assert got["total_rank"] == got["budget"]
    assert_same_growth(got["history"], expected["history"])
    assert_same_training(got["parameters"], expected["parameters"])


@pytest.mark.parametrize("options", [{"importance_window": 2}, {"scaling": "rank", "use_rslora": True}])
def test_a_training_from_nothing_agrees_with_eager_mode(options):
    options = {"init_r": 0, "deltaT": 4} | options
    expected = train(adapted(**options))
    model = adapted(**options)
    compiled, counter = compile_counting(model)
    got = train(model, compiled)
    # torch knows the stride of a B without columns: once anew for each of the three modules.
    assert counter.frame_count <= 4
    assert got["total_rank"] == got["budget"]
    assert_same_growth(got["history"], expected["history"])
    assert_same_training(got["parameters"], expected["parameters"])


def test_a_compiled_training_again_gives_the_same_bits():
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        model = adapted(lora_dropout=0.2)
        results.append(train(model, compile_counting(model)[0]))
    assert results[0]["history"] == results[1]["history"]
    for first, second in zip(results[0]["parameters"], results[1]["parameters"], strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["LoRA's", "the paper's"])
def test_inductor_compiles_once_and_agrees(form):
    make, options = FORMS[form]
    expected = train(adapted(make, **options))
    model = adapted(make, **options)
    compiled, counter = compile_counting(model, "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = train(model, compiled)
    assert counter.frame_count == 1
    assert_same_growth(got["history"], expected["history"])
    assert_same_training(got["parameters"], expected["parameters"])


@pytest.mark.slow
def test_inductor_draws_masks_of_the_right_share_and_the_same_in_both_passes():
    model = adapted(lora_dropout=0.25, target_modules=["0"], init_lora_weights=False, r=1)
    attach(model, optimizer_of(model), total_steps=100)
    layer = model.base_model.model.inner[0]
    compiled = torch.compile(layer, backend="inductor", fullgraph=True)
    x = torch.ones(4000, 9, requires_grad=True)
    layer.base_layer.weight.data.zero_()
    compiled(x).sum().backward()
    # The base weight is 0, so what is dropped has no gradient, and what is kept has A scaled up.
    kept = x.grad != 0
    assert 0.73 < kept.float().mean() < 0.77
    update = layer.update("default")
    a, b, e = update.a, update.b, update.e
    per_element = (b.sum(0) * e.view(-1)) @ a * layer.scaling["default"] / 0.75
    torch.testing.assert_close(x.grad, kept * per_element.detach(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("form", ["LoRA's", "the paper's"])
def test_evaluation_between_growths_is_compiled_once_too(form):
    make, options = FORMS[form]
    expected = train(adapted(make, **options), evaluate=True)
    model = adapted(make, **options)
    compiled, counter = compile_counting(model)
    got = train(model, compiled, evaluate=True)
    assert counter.frame_count == 2
    assert_same_training(got["evaluated"], expected["evaluated"])


def gradients(*, compiled, backend="aot_eager", checkpointed=False, around=False, dtype=None, dropout=0.5):
    """Output, gradients and importance of one pass in training, autocast around it or not."""
    model = adapted(
        checkpointed=checkpointed, lora_dropout=dropout, init_lora_weights=False, importance="sensitivity"
    )
    if dtype is not None:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    attach(model, optimizer_of(model), total_steps=100)
    probe = armed_probe(model)
    net = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
    torch.manual_seed(9)
    x = torch.randn(40, 9).to(dtype or torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        out = net(x)
    out.float().square().mean().backward()
    own = [p.grad for p in model.parameters() if p.requires_grad]
    return [out.detach(), x.grad, probe.gauge.total, *own]


CASES = {
    "plain": {},
    "autocast around": {"around": True},
    "bfloat16 base": {"dtype": torch.bfloat16},
    "checkpointing": {"checkpointed": True},
    "checkpointing under autocast": {"checkpointed": True, "around": True},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_importance_are_those_of_eager_mode(case):
    expected = gradients(compiled=False, **CASES[case])
    got = gradients(compiled=True, **CASES[case])
    assert expected[2].min() > 0
    narrow = case != "plain" and case != "checkpointing"
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs, torch.bfloat16 if narrow else torch.float32)


@pytest.mark.slow
def test_inductor_recomputes_a_checkpointed_block_with_the_same_mask():
    # Against differences of the loss, whose masks are those of forward passes: inductor's random numbers are
    # others without the checkpoint from torch 2.14 on.
    model = adapted(checkpointed=True, lora_dropout=0.5, init_lora_weights=False).double()
    net = torch.compile(model, backend="inductor", fullgraph=True)

    def loss(x):
        torch.manual_seed(9)
        return net(x).square().mean()

    torch.manual_seed(10)
    x = torch.randn(40, 9, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    ahead, behind = (loss((x + way * gradient).detach().requires_grad_()).item() for way in (1e-5, -1e-5))
    torch.testing.assert_close((ahead - behind) / 2e-5, gradient.square().sum().item(), rtol=1e-5, atol=0.0)


def test_autocast_inside_the_compiled_function_is_obeyed():
    model = adapted(init_lora_weights=False)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    x, _ = batch(0)
    expected = step(x)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == torch.bfloat16
    assert_near(got, expected, torch.bfloat16)


def test_two_forward_passes_before_their_backward_passes():
    expected, got = [], []
    for compiled, results in ((False, expected), (True, got)):
        model = adapted(init_lora_weights=False, importance="sensitivity")
        attach(model, optimizer_of(model), total_steps=100)
        probe = armed_probe(model)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        first, second = net(batch(1)[0]), net(batch(2)[0])
        second.square().mean().backward()
        first.square().mean().backward()
        results += [probe.gauge.total, *[p.grad for p in model.parameters() if p.requires_grad]]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_importance_is_not_computed_where_it_is_not_asked_for():
    model = adapted(init_lora_weights=False, importance="sensitivity")
    attach(model, optimizer_of(model), total_steps=100)
    probe = armed_probe(model)
    net = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for asked in (True, False, True):
            probe.gauge.total.zero_()
            probe.arm(asked)
            net(batch(0)[0]).square().mean().backward()
            seen.append(probe.gauge.total.clone())
    assert seen[0].min() > 0
    assert not seen[1].any()
    assert torch.equal(seen[2], seen[0])


def test_compiled_training_goes_on_after_detach():
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    for t in range(STEPS):
        if t == STEPS // 2:
            scheduler.detach()
        x, y = batch(t)
        loss = nn.functional.mse_loss(compiled(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, _ = batch(0)
    assert_near(compiled(x), model(x))


def test_hooks_on_the_base_layer_are_kept(make_plain, plain_input):
    model = peft.get_peft_model(make_plain(), growing(target_modules=["lin0"], init_lora_weights=False))
    model.base_model.model.lin0.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(compiled(plain_input), model(plain_input))


def test_two_active_adapters(make_plain, plain_input, grow):
    config = growing(target_modules=["lin0", "lin1"], init_lora_weights=False)
    model = peft.get_peft_model(make_plain(), config)
    grow(model)
    model.add_adapter("other", copy.deepcopy(config))
    model.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(compiled(plain_input), model(plain_input))


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.lin = nn.Embedding(20, 9), nn.Conv1d(9, 14, 3, padding=1), nn.Linear(14, 6)

    def forward(self, x):
        ids = (10 * x.sigmoid()).long()
        return self.lin(self.conv(self.emb(ids).transpose(1, 2)).tanh().mean(-1))


def test_embeddings_and_convolutions_train_outside_of_the_graphs():
    def make():
        torch.manual_seed(3)
        config = growing(r=3, lora_alpha=6, target_modules=["emb", "conv", "lin"], top_h=1, deltaT=5)
        return peft.get_peft_model(Signal(), config)

    expected = train(make())
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    got = train(model, torch.compile(model, backend=counter))
    assert counter.frame_count >= 1
    assert_same_growth(got["history"], expected["history"])
    assert got["total_rank"] == got["budget"]
    assert_same_training(got["parameters"], expected["parameters"])


def llama_rows(n=32):
    ids = torch.randint(0, 99, (n, 7), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer_compiles_a_language_model_once(make_llama, tmp_path):
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = growing(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        torch.manual_seed(2)
        model = peft.get_peft_model(make_llama(), config)
        callback = IncreLoraCallback()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / str(compiled)),
                max_steps=24,
                per_device_train_batch_size=4,
                learning_rate=5e-3,
                torch_compile=compiled,
                torch_compile_backend="aot_eager" if compiled else None,
                logging_steps=8,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                seed=1,
            ),
            train_dataset=llama_rows(),
            callbacks=[callback],
        )
        trainer.train()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        results[compiled] = callback.scheduler.history.tolist(), losses, graphs
        assert callback.scheduler.total_rank == callback.scheduler.budget
    assert results[True][2] == 1
    assert_same_growth(results[True][0], results[False][0])
    assert results[True][1] == pytest.approx(results[False][1], abs=1e-4)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def exported(model, tokens, **options):
    return torch.export.export(Logits(model).eval(), (tokens,), **options)


@pytest.fixture
def trained_llama(make_llama, grow):
    config = growing(r=3, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(make_llama(), config)
    grow(model)
    return model.eval()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_gives_the_same_logits(trained_llama, tokens, strict):
    program = exported(trained_llama, tokens, strict=strict)
    assert any("increlora.low_rank_linear" in str(node.target) for node in program.graph.nodes)
    assert_near(program.module()(tokens), Logits(trained_llama)(tokens))


def test_an_exported_program_is_saved_and_loaded(trained_llama, tokens):
    file = io.BytesIO()
    torch.export.save(exported(trained_llama, tokens), file)
    file.seek(0)
    assert_near(torch.export.load(file).module()(tokens), Logits(trained_llama)(tokens))


def test_an_exported_program_takes_other_batches(trained_llama, tokens):
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = exported(trained_llama, tokens, dynamic_shapes={"ids": sizes})
    other = torch.randint(0, 99, (3, 5))
    assert_near(program.module()(other), Logits(trained_llama)(other))


def test_a_merged_model_exports_without_our_operations(trained_llama, tokens):
    expected = Logits(trained_llama)(tokens)
    program = exported(trained_llama.merge_and_unload(), tokens)
    assert not any("increlora" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(tokens), expected, atol=1e-5, rtol=1e-4)


def test_a_model_exports_while_its_ranks_grow(make_llama, tokens):
    model = peft.get_peft_model(make_llama(), growing(target_modules=["q_proj"]))
    attach(model, optimizer_of(model), total_steps=100)
    program = exported(model, tokens)
    assert_near(program.module()(tokens), Logits(model)(tokens))


def operation_arguments(dropout, reserve, sketched):
    def matrix(*shape, **options):
        return torch.randn(*shape, dtype=torch.float64, **options)

    a, b = matrix(3, 5, requires_grad=True), matrix(4, 3, requires_grad=True)
    e = matrix(3 - reserve, 1, requires_grad=True)
    seed = torch.tensor(7) if dropout else None
    factor = torch.tensor([1.5], dtype=torch.float64)
    given = [matrix(2, 5), matrix(3, 4)] if sketched else []
    size = 2 * 4 + 3 * 5 if sketched else 1
    collector = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    asked = (collector, torch.tensor(True), given, "sketch" if sketched else "sensitivity")
    shared = (a, b, e, seed, factor, 0.5, dropout, *asked)
    x = matrix(2, 6, 5, requires_grad=True)
    return (matrix(2, 6, 4, requires_grad=True), x, *shared), (x, matrix(4, 5), matrix(4), *shared)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reserve", [0, 1])
@pytest.mark.parametrize("sketched", [False, True])
def test_the_operations_keep_to_the_rules_of_torch_library(dropout, reserve, sketched):
    added, whole = operation_arguments(dropout, reserve, sketched)
    torch.library.opcheck(torch.ops.increlora.add_low_rank.default, added)
    torch.library.opcheck(torch.ops.increlora.low_rank_linear.default, whole)


@pytest.mark.slow
def test_compiled_models_train_under_distributed_data_parallel(tmp_path):
    first, second = torchrun(2, "compiled.py", tmp_path, timeout=400, weights_only=False)
    for way in ("compiled, then wrapped", "wrapped, then compiled"):
        assert len(first[way]["history"]) >= 4
        assert first[way]["history"] == second[way]["history"]
        assert_same_growth(first[way]["history"], first["eager"]["history"])
        for name, value in first["eager"]["parameters"].items():
            assert_same_training([first[way]["parameters"][name]], [value])
            assert torch.equal(first[way]["parameters"][name], second[way]["parameters"][name])
        assert first[way]["graphs"] == 1
