"""SoRA: the gates against the method written down literally, with two optimizers, in float64."""

import math

import increlora_rs
import pytest
import torch
from increlora_rs import IncreLoraCallback, SoraConfig, attach, export_lora, rank_table
from increlora_rs.layers.found import adapted_layers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

SHAPES = {"lin0": (20, 12), "lin1": (6, 20)}


def configure(**kwargs):
    return SoraConfig(**({"target_modules": list(SHAPES), "r": 4, "lora_alpha": 8} | kwargs))


def adapted(make_plain, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(make_plain(), configure(**kwargs)).double()


def gates_of(model):
    return [layer.lora_E["default"].weight for layer in adapted_layers(model, "default").values()]


def batches(steps, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randn(9, 12, generator=generator, dtype=torch.float64),
            torch.randn(9, 6, generator=generator, dtype=torch.float64),
        )


def soft(gate, xi):
    return gate.sign() * (gate.abs() - xi).clamp(min=0.0)


def official(gate, xi):
    moved = torch.where(gate > xi, gate - xi, torch.where(gate < -xi, gate + xi, gate))
    return torch.where(moved.abs() < xi, torch.zeros_like(moved), moved)


class Literal:
    """The two-layer model with ``s B diag(g) A`` formed whole; AdamW on A and B, another on the gates,
    and the L1 term in the loss."""

    def __init__(self, model, config, lr, decay, gate_lr, steps):
        self.base, self.config = {}, config
        self.factors = {}
        for name, layer in adapted_layers(model, "default").items():
            own = [p.detach().clone().requires_grad_() for p in layer.factors("default")]
            self.factors[name.rpartition(".")[2]] = own
            self.base[name.rpartition(".")[2]] = layer.base_layer
        thin = [p for a, b, _ in self.factors.values() for p in (a, b)]
        self.gates = [g for _, _, g in self.factors.values()]
        self.optimizers = [
            torch.optim.AdamW(thin, lr, weight_decay=decay),
            torch.optim.AdamW(self.gates, gate_lr, weight_decay=0.0),
        ]
        fall = [lambda step: 1.0 - step / (2 * steps)]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, fall) for o in self.optimizers]

    def __call__(self, x):
        for name in SHAPES:
            a, b, g = self.factors[name]
            scale = self.config.lora_alpha / self.config.r
            x = functional.linear(
                x, self.base[name].weight + scale * b @ torch.diag(g.view(-1)) @ a, self.base[name].bias
            )
            x = torch.relu(x) if name == "lin0" else x
        return x

    def step(self, x, y, xi):
        count = sum(g.numel() for g in self.gates)
        penalty = self.config.sparse_lambda * sum(g.abs().sum() for g in self.gates) / count
        (functional.mse_loss(self(x), y) + penalty).backward()
        gate_lr = self.optimizers[1].param_groups[0]["lr"]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        xi = xi * gate_lr if self.config.threshold_times_lr else xi
        shrink = soft if self.config.prox == "soft" else official
        with torch.no_grad():
            for gate in self.gates:
                gate.copy_(shrink(gate, xi))
        for schedule in self.schedules:
            schedule.step()


FORMS = {
    "soft": {"sparse_lambda_2": 3e-2},
    "official": {"sparse_lambda_2": 2e-2, "prox": "official"},
    "L1 alone": {"sparse_lambda": 10.0, "sparse_lambda_2": 0.0},
    "times the learning rate": {"sparse_lambda_2": 2.0, "threshold_times_lr": True},
    "a learning rate of their own": {"sparse_lambda_2": 2e-2, "sparse_lr": 5e-2},
    "none of their own": {"sparse_lambda_2": 2e-2, "sparse_lr": 0.0},
    "a schedule": {"sparse_lambda_2": 0.0, "lambda_schedule": "linear", "max_lambda": 0.06, "lambda_num": 4},
}


@pytest.mark.parametrize("form", FORMS)
def test_training_follows_the_two_optimizers_of_the_method(make_plain, form):
    steps, lr, decay = 40, 2e-2, 0.3
    model = adapted(make_plain, **FORMS[form])
    config = model.peft_config["default"]
    gate_lr = lr if config.sparse_lr is None else config.sparse_lr
    literal = Literal(model, config, lr, decay, gate_lr, steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (2 * steps))
    attach(model, optimizer, total_steps=steps)
    for t, (x, y) in enumerate(batches(steps)):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        values = [0.0, 0.02, 0.04, 0.06] if form == "a schedule" else [config.sparse_lambda_2]
        literal.step(x, y, values[t * len(values) // steps])
    for layer, own in zip(adapted_layers(model, "default").values(), literal.factors.values(), strict=True):
        for ours, theirs in zip(layer.factors("default"), own, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if form not in ("L1 alone", "none of their own"):
        assert any((gate == 0.0).any() for gate in literal.gates)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD], ids=lambda make: make.__name__)
def test_a_weight_decay_that_goes_through_the_gradient_leaves_gates_alone(make_plain, make):
    trained = []
    for decay in (0.0, 0.5):
        model = adapted(make_plain, sparse_lambda=0.0, sparse_lambda_2=0.0)
        optimizer = make(
            [
                {"params": [p for n, p in model.named_parameters() if p.requires_grad and "lora_E" not in n]},
                {"params": gates_of(model), "weight_decay": decay},
            ],
            lr=1e-2,
        )
        attach(model, optimizer, total_steps=10)
        for x, y in batches(10):
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([gate.detach().clone() for gate in gates_of(model)])
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-9, atol=1e-12)


def test_without_a_gradient_and_an_l1_term_each_step_takes_the_threshold_off(make_plain):
    model = adapted(make_plain, sparse_lambda=0.0, sparse_lambda_2=0.05)
    first = [gate.detach().clone() for gate in gates_of(model)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, optimizer, total_steps=7)
    for _ in range(7):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    for gate, start in zip(gates_of(model), first, strict=True):
        torch.testing.assert_close(gate.detach().abs(), (start.abs() - 7 * 0.05).clamp(min=0.0))


def test_gates_start_from_a_normal_distribution_and_none_is_zero():
    model = get_peft_model(nn.Sequential(nn.Linear(600, 600)), SoraConfig(target_modules=["0"], r=500))
    gates = gates_of(model)[0].detach()
    assert (gates != 0.0).all()
    assert abs(float(gates.mean())) < 0.2 and 0.85 < float(gates.std()) < 1.15


def test_a_gate_that_is_closed_may_open_again(make_plain):
    model = adapted(make_plain, sparse_lambda=0.0, sparse_lambda_2=1e-4)
    with torch.no_grad():
        for layer in adapted_layers(model, "default").values():
            layer.lora_B["default"].weight.normal_()
            layer.lora_E["default"].weight.zero_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    scheduler = attach(model, optimizer, total_steps=3)
    assert scheduler.total_rank == 0
    for x, y in batches(3):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank > 0


def pruned(make_plain, closed):
    """A trained adapter of which the gates ``closed`` by module are 0."""
    model = adapted(make_plain, init_lora_weights=False)
    with torch.no_grad():
        for name, layer in adapted_layers(model, "default").items():
            layer.lora_E["default"].weight[closed[name.rpartition(".")[2]]] = 0.0
    return model.eval()


def test_the_export_holds_the_open_gates_alone_and_gives_the_same_outputs(make_plain, tmp_path):
    model = pruned(make_plain, {"lin0": [0, 2], "lin1": [1]})
    export = export_lora(model, tmp_path, layout="compact")
    assert export.config.r == 3
    assert rank_table(model).total_rank == 2 + 3
    plain = PeftModel.from_pretrained(make_plain(), tmp_path).double().eval()
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)
    shapes = {n: tuple(p.shape) for n, p in plain.named_parameters() if "lora_A" in n}
    assert sorted(shapes.values()) == [(2, 12), (3, 20)]


def test_an_export_without_any_open_gate_changes_nothing(make_plain, tmp_path):
    model = pruned(make_plain, {"lin0": [0, 1, 2, 3], "lin1": [0, 1, 2, 3]})
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(make_plain(), tmp_path).eval()
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain(x), make_plain()(x))


def test_a_saved_adapter_keeps_every_gate_and_goes_on(make_plain, tmp_path):
    model = pruned(make_plain, {"lin0": [0, 2], "lin1": [1]})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_plain(), tmp_path, is_trainable=True).double()
    for ours, theirs in zip(gates_of(loaded), gates_of(model), strict=True):
        assert torch.equal(ours, theirs)
    assert [layer.rank("default") for layer in adapted_layers(loaded, "default").values()] == [4, 4]


def test_the_scale_stays_that_of_the_rank_at_the_start(make_plain):
    model = pruned(make_plain, {"lin0": [0, 1, 2], "lin1": []})
    for layer in adapted_layers(model, "default").values():
        assert layer.scaling["default"] == 8 / 4


THRESHOLDS = {
    "linear": [0.1, 0.4, 0.7, 1.0],
    "log_linear": [math.log(math.exp(0.1) + k / 3 * (math.e - math.exp(0.1))) for k in range(4)],
    "exp_linear": [0.1 * 10 ** (k / 3) for k in range(4)],
}


@pytest.mark.parametrize("schedule", THRESHOLDS)
def test_the_schedules_take_even_steps_of_what_they_say(schedule):
    config = SoraConfig(sparse_lambda_2=0.1, max_lambda=1.0, lambda_num=4, lambda_schedule=schedule)
    assert config.thresholds() == pytest.approx(THRESHOLDS[schedule])


def test_a_training_without_a_scheduler_is_noticed(make_plain):
    model = get_peft_model(make_plain(), configure())
    with pytest.warns(UserWarning, match="adapter of SoRA and no scheduler attached"):
        for _ in range(50):
            model(torch.randn(2, 12)).sum().backward()


def test_logs_tell_the_open_gates(make_plain):
    model = adapted(make_plain)
    scheduler = attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=3)
    with torch.no_grad():
        gates_of(model)[0][:3] = 0.0
    assert scheduler.logs() == {"total_rank": 5, "closed_gates": pytest.approx(3 / 8)}
    assert scheduler.ranks == {"lin0": 1, "lin1": 4}
    with pytest.raises(AttributeError, match="a scheduler of 'sora' has no 'budget'"):
        _ = scheduler.budget


BAD = {
    "sparse_lambda": (-1.0, ValueError),
    "sparse_lambda_2": (-1e-3, ValueError),
    "prox": ("hard", ValueError),
    "threshold_times_lr": (2, ValueError),
    "sparse_lr": (-1.0, ValueError),
    "lambda_schedule": ("cubic", ValueError),
    "max_lambda": (-1.0, ValueError),
    "lambda_num": (1, ValueError),
    "init_lora_weights": ("svd", ValueError),
    "lora_alpha": (0, ValueError),
    "r": (0, ValueError),
    "use_dora": ("yes", ValueError),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name):
    value, error = BAD[name]
    with pytest.raises(error, match=rf"{name}={value!r}"):
        configure(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lambda_schedule": "linear", "max_lambda": 1e-4},
            "max_lambda=0.0001 is below sparse_lambda_2=0.001",
        ),
        ({"lambda_schedule": "exp_linear", "sparse_lambda_2": 0.0}, "sparse_lambda_2=0.0 has no logarithm"),
        ({"lambda_schedule": "log_linear", "max_lambda": 1e4}, "max_lambda=10000.0 has no exponential"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configure(**options)


def test_a_longer_training_that_is_resumed_goes_on_by_the_schedule_of_the_first(make_plain):
    settings = {"sparse_lambda_2": 0.0, "lambda_schedule": "linear", "max_lambda": 0.1, "lambda_num": 5}
    model = adapted(make_plain, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    planned = attach(model, optimizer, total_steps=10).policy
    state = optimizer.state_dict()
    for total_steps in (20, 30):
        # Also of what was resumed already.
        model = adapted(make_plain, **settings)
        again = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        again.load_state_dict(state)
        with pytest.warns(UserWarning, match=f"total_steps={total_steps}, .* goes on by that plan"):
            resumed = attach(model, again, total_steps=total_steps).policy
        assert [resumed.threshold(k) for k in range(1, 25)] == [planned.threshold(k) for k in range(1, 25)]
        state = again.state_dict()


def test_a_schedule_needs_the_number_of_steps(make_plain):
    model = adapted(make_plain, lambda_schedule="linear")
    with pytest.raises(ValueError, match=r"total_steps=None: lambda_schedule='linear'"):
        attach(model, torch.optim.SGD(model.parameters(), 0.1))


def test_the_names_are_public():
    assert {"SoraConfig", "LoraMiniConfig"} <= set(increlora_rs.__all__)
    assert IncreLoraCallback is increlora_rs.IncreLoraCallback
