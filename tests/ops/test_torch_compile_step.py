"""A compiled optimizer step, and compiled functions around it, train as the same calls without compiling."""

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.resizing.optimizer_state import watch
from peft import get_peft_model
from torch import nn

STEPS = 6
OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "AdamW, lr in a tensor": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01)),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


class Training:
    """Six steps in which the ranks of two layers grow from 1 to 2."""

    def __init__(self, optimizer="AdamW", scaler=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        config = growing(r=2, lora_alpha=2, target_modules=["0", "2"], init_r=1, tinit=1, deltaT=2, top_h=1)
        self.model = get_peft_model(net, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](self.trained)
        self.scaler = scaler
        self.scheduler = attach(self.model, self.optimizer, total_steps=STEPS, scaler=scaler)

    def backward(self, t):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(3, 4, generator=generator)
        self.optimizer.zero_grad()
        loss = (self.model(x) - x.flip(0)).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def step(self, t):
        self.backward(t)
        self.optimizer.step()

    def step_of_the_scaler(self, t):
        self.backward(t)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def all_steps(self):
        for t in range(STEPS):
            self.step(t)


def _step_alone(training, compiled):
    step = compiled(training.optimizer.step)
    for t in range(STEPS):
        training.backward(t)
        step()


def _step_with_a_closure(training, compiled):
    step, at = compiled(training.optimizer.step), [0]
    for at[0] in range(STEPS):
        step(lambda: training.backward(at[0]))


def _step_in_a_function(training, compiled):
    step = compiled(training.step)
    for t in range(STEPS):
        step(t)


def _whole_loop(training, compiled):
    compiled(training.all_steps)()


def _step_of_a_scaler(training, compiled):
    step = compiled(training.step_of_the_scaler)
    for t in range(STEPS):
        step(t)


def _same(training, expected):
    assert training.scheduler.ranks == expected.scheduler.ranks
    assert training.scheduler.total_rank == 4
    for mine, wanted in zip(training.trained, expected.trained, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _compiled(function):
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_step_trains_as_the_plain_one(optimizer):
    compiled, plain = Training(optimizer), Training(optimizer)
    _step_alone(compiled, _compiled)
    plain.all_steps()
    _same(compiled, plain)


@pytest.mark.parametrize("run", [_step_with_a_closure, _step_in_a_function, _whole_loop])
def test_a_compiled_training_is_the_plain_one(run):
    compiled, plain = Training(), Training()
    run(compiled, _compiled)
    plain.all_steps()
    _same(compiled, plain)


def _clipping_in_a_function(training, compiled):
    @compiled
    def step(t):
        training.backward(t)
        torch.nn.utils.clip_grad_norm_(training.trained, 0.1)
        training.optimizer.step()

    for t in range(STEPS):
        step(t)


def test_a_compiled_function_that_clips_trains_as_the_plain_one():
    compiled, plain = Training(), Training()
    _clipping_in_a_function(compiled, _compiled)
    _clipping_in_a_function(plain, lambda function: function)
    _same(compiled, plain)


def _micro_batches_of_other_sizes(training, compiled):
    model = compiled(training.model)
    for t in range(STEPS):
        training.optimizer.zero_grad(set_to_none=t % 2 == 0)
        for size in (3, 5, 2):
            x = torch.randn(size, 4, generator=torch.Generator().manual_seed(t + size))
            (model(x) - x.flip(0)).square().mean().backward()
        training.optimizer.step()


def test_a_model_compiled_anew_where_there_are_gradients_trains_as_the_plain_one():
    compiled, plain = Training(), Training()
    _micro_batches_of_other_sizes(compiled, _compiled)
    _micro_batches_of_other_sizes(plain, lambda function: function)
    _same(compiled, plain)


def test_a_compiled_step_under_a_scaler_trains_as_the_plain_one():
    compiled, plain = (Training(scaler=torch.amp.GradScaler("cpu", init_scale=8.0)) for _ in range(2))
    _step_of_a_scaler(compiled, _compiled)
    _step_of_a_scaler(plain, lambda function: function)
    _same(compiled, plain)


def test_the_state_is_saved_and_loaded_in_a_compiled_function():
    training = Training()
    training.step(0)

    def save_and_load():
        training.optimizer.load_state_dict(training.optimizer.state_dict())

    _compiled(save_and_load)()
    assert training.scheduler.restored


def test_a_compiled_function_attaches_and_detaches():
    training = Training()
    training.scheduler.detach()

    def again():
        scheduler = attach(training.model, training.optimizer, total_steps=STEPS)
        scheduler.detach()
        return scheduler.total_rank

    assert _compiled(again)() == 2


def test_state_of_another_shape_is_dropped_before_a_compiled_step():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    with torch.no_grad():
        parameter.set_(torch.ones(4, 3))
    watch(parameter)
    parameter.grad = torch.ones(4, 3)
    with pytest.warns(UserWarning, match="it changed its rank without the optimizer"):
        _compiled(optimizer.step)()
    assert optimizer.state[parameter]["exp_avg"].shape == (4, 3)
