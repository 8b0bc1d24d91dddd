"""What a policy is promised by the training that calls it, shown with policies that no method has."""

import io
import logging

import numpy as np
import pytest
import torch
from growing import growing
from increlora_rs import attach, growth_history
from increlora_rs.contract.policy import Event, Policy
from increlora_rs.gauges import Sensitivity
from increlora_rs.methods.increlora.growth import Growth
from peft import get_peft_model

STEPS = 12


def adapted(make_plain):
    torch.manual_seed(5)
    config = growing(r=3, init_r=2, lora_alpha=6, target_modules=["lin0", "lin1"])
    return get_peft_model(make_plain(), config)


def adamw(model, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **kwargs)


def loss_of(model, number):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(number))
    return model(x).square().mean()


def train(model, optimizer, first, last):
    for number in range(first, last + 1):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# A policy as it is.


def test_a_policy_as_it_is_changes_nothing(make_plain):
    trained = []
    for watched in (False, True):
        model = adapted(make_plain)
        optimizer = adamw(model)
        if watched:
            scheduler = attach(model, optimizer, policy=Policy)
        train(model, optimizer, 1, STEPS)
        trained.append(values(model))
    assert same(*trained)
    assert (scheduler.step, scheduler.total_rank, len(scheduler.history)) == (STEPS, 4, 0)
    assert scheduler.logs() == {"total_rank": 4}
    assert set(scheduler.scalars()) == {
        f"increlora/{kind}/{name}" for kind in ("rank", "score") for name in ("lin0", "lin1")
    }


@pytest.mark.parametrize("name", ["budget", "spent", "schedule", "orth_reg"])
def test_what_a_policy_has_not_a_scheduler_has_not_and_says_so(make_plain, name):
    model = adapted(make_plain)
    scheduler = attach(model, adamw(model), policy=Policy)
    assert not hasattr(scheduler, name)
    with pytest.raises(AttributeError, match=rf"'increlora' has no '{name}', for Policy has none"):
        getattr(scheduler, name)


# When it is called.


class Calls(Policy):
    """Notes what it is called with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def start(self):
        self.seen.append("start")

    def before_step(self, step):
        self.seen.append(("before", step.number))

    def after_step(self, step):
        self.seen.append(("after", step.number))

    def resized(self):
        self.seen.append("resized")

    def finish(self):
        self.seen.append("finish")


def test_each_step_that_counts_calls_before_and_after_whatever_was_accumulated(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Calls)
    optimizer.step()
    for number in (1, 2):
        for _ in range(number):
            loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.detach()
    around = [(when, number) for number in (1, 2) for when in ("before", "after")]
    assert scheduler.policy.seen == ["start", *around, "finish"]


def test_a_closure_called_twice_is_two_before_and_one_after(make_plain):
    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    model = adapted(make_plain)
    optimizer = Twice([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = attach(model, optimizer, policy=Calls)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert scheduler.policy.seen == ["start", ("before", 1), ("before", 1), ("after", 1)]
    assert scheduler.step == 1


def test_a_step_that_a_fused_optimizer_skips_has_no_after_and_is_counted_as_skipped(make_plain):
    class Skips(Calls):
        def before_step(self, step):
            self.seen.append((step.number, step.skipped, float(step.found_inf)))

    model = adapted(make_plain)
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scheduler = attach(model, optimizer, scaler=scaler, policy=Skips)
    for boom in (1e38, 1.0):
        scaler.scale(loss_of(model, 1) * boom).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scheduler.policy.seen == ["start", (1, 0, 1.0), (1, 1, 0.0), ("after", 1)]


def test_a_load_of_other_ranks_is_told_before_the_next_step(make_plain, grow):
    model, other = adapted(make_plain), adapted(make_plain)
    grow(other, {"lin0": 4, "lin1": 3})
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Calls)
    train(model, optimizer, 1, 1)
    model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="optimizer state starts anew"):
        train(model, optimizer, 2, 2)
    assert scheduler.policy.seen[3:] == ["resized", ("before", 2), ("after", 2)]
    assert scheduler.total_rank == 7


# What it may do: gates that shrink, with an L1 term, a learning rate of their own and a threshold that grows.


class Gates(Policy):
    weight = 0.1

    def __init__(self, modules, config, plan, lr=1e-3):
        super().__init__(modules, config, plan)
        self.gates, self.lr, self.threshold = [module.factors[2] for module in modules], lr, 0.0
        (self.group,) = plan.optimizer.param_groups

    def before_step(self, step):
        count = sum(gate.numel() for gate in self.gates)
        scale = 1.0 if step.grad_scale is None else step.grad_scale
        for gate in self.gates:
            gate.grad += scale * self.weight / count * gate.sign()
        self.old = [gate.detach().clone() for gate in self.gates]

    def after_step(self, step):
        lr, decay = self.group["lr"], self.group["weight_decay"]
        self.threshold += 1e-3
        for gate, old in zip(self.gates, self.old, strict=True):
            gate.copy_(old + self.lr / lr * (gate - old * (1.0 - lr * decay)))
            gate.copy_(gate.sign() * (gate.abs() - self.threshold).clamp(min=0.0))

    def ranks(self):
        return [int(torch.count_nonzero(gate)) for gate in self.gates]

    def state_dict(self):
        return {"threshold": self.threshold}

    def load_state_dict(self, state):
        self.threshold = state["threshold"]


def without_learning(*args):
    return Gates(*args, lr=0.0)


def test_gates_that_only_shrink_are_what_they_were_less_all_thresholds(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model, weight_decay=0.5)
    scheduler = attach(model, optimizer, policy=without_learning)
    train(model, optimizer, 1, 10)
    for gate in scheduler.policy.gates:
        torch.testing.assert_close(gate.detach(), torch.full((2, 1), 1.0 - 1e-3 * 55))


def test_an_l1_gradient_and_the_others_reach_the_optimizer_as_a_sum(make_plain):
    model, plain = adapted(make_plain), adapted(make_plain)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = attach(model, optimizer, policy=Gates)
    loss_of(model, 1).backward()
    loss_of(plain, 1).backward()
    optimizer.step()
    own = [p.grad for name, p in plain.named_parameters() if "lora_E" in name]
    for gate, gradient in zip(scheduler.policy.gates, own, strict=True):
        torch.testing.assert_close(gate.grad, gradient + 0.1 / 4)


def test_ranks_are_those_that_the_policy_counts(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Gates)
    with torch.no_grad():
        scheduler.policy.gates[1][0] = 1e-4
    train(model, optimizer, 1, 1)
    assert scheduler.ranks == {"lin0": 2, "lin1": 1}
    assert scheduler.total_rank == scheduler.logs()["total_rank"] == 3


@pytest.mark.parametrize("attached_first", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(make_plain, attached_first):
    whole = adapted(make_plain)
    optimizer = adamw(whole)
    attach(whole, optimizer, policy=Gates)
    train(whole, optimizer, 1, STEPS)
    model = adapted(make_plain)
    optimizer = adamw(model)
    attach(model, optimizer, policy=Gates)
    train(model, optimizer, 1, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model = adapted(make_plain)
    optimizer = adamw(model)
    if attached_first:
        scheduler = attach(model, optimizer, policy=Gates)
    for holder, state in zip((model, optimizer), torch.load(file, weights_only=True), strict=True):
        holder.load_state_dict(state)
    if not attached_first:
        scheduler = attach(model, optimizer, policy=Gates)
    assert (scheduler.step, scheduler.restored) == (5, True)
    train(model, optimizer, 6, STEPS)
    assert same(values(model), values(whole))


# The gauge.


class Gauged(Policy):
    """Sums up what the backward passes of every other step gave."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gauge = Sensitivity.of(len(self.modules))
        self.sum = torch.zeros(len(self.modules), dtype=torch.float64)

    def wants(self, number):
        return number % 2 == 0

    def before_step(self, step):
        if step.armed:
            self.sum += self.gauge.total
            self.gauge.total.zero_()

    def scores(self):
        return self.sum.numpy()


def test_the_gauge_is_collected_where_the_policy_wants_it(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Gauged)
    seen = []
    for number in range(1, 5):
        train(model, optimizer, number, number)
        seen.append(sum(scheduler.scores.values()))
    assert seen[0] == 0.0 < seen[1] == seen[2] < seen[3]


def test_what_the_gauge_holds_is_in_the_checkpoint(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Gauged)
    train(model, optimizer, 1, 1)
    loss_of(model, 2).backward()
    held = scheduler.policy.gauge.total.clone()
    again = adapted(make_plain)
    again.load_state_dict(model.state_dict())
    fresh = adamw(again)
    resumed = attach(again, fresh, policy=Gauged)
    loss_of(again, 3).backward()
    fresh.load_state_dict(optimizer.state_dict())
    assert held.any()
    assert torch.equal(resumed.policy.gauge.total, held)


# Events.


class Masks(Policy):
    """Takes a component out of the second module at step 2, without changing a size."""

    def after_step(self, step):
        if step.number != 2:
            return None
        self.modules[1].factors[2][0] = 0.0
        scores = np.array([2.0, 1.0])
        return Event([1], scores, "1 masked", resized=False, restarted=(self.modules[1].factors[1],))

    def ranks(self):
        return [int(torch.count_nonzero(module.factors[2])) for module in self.modules]


def test_an_event_goes_into_history_and_log_where_no_size_changed(make_plain, caplog):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Masks)
    told = []
    scheduler.on_growth(told.append)
    with caplog.at_level(logging.INFO, logger="increlora_rs"):
        train(model, optimizer, 1, 2)
    assert scheduler.history.tolist() == [(2, "lin1", 1, 1.0)]
    history = scheduler.session.probe.history
    assert (history.budget, history.first_ranks, history.ranks) == (None, [2, 2], [[2, 1]])
    assert "step 2: 1 masked" in caplog.text
    assert told == []
    assert model.peft_config["default"].rank_pattern == {}


def test_parameters_of_an_event_begin_their_optimizer_state_anew(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Masks)
    train(model, optimizer, 1, 2)
    (of_first, of_second) = (module.factors[1] for module in scheduler.session.modules)
    assert of_second not in optimizer.state
    train(model, optimizer, 3, 3)
    assert [float(optimizer.state[b]["step"]) for b in (of_first, of_second)] == [3.0, 1.0]


class Sized(Policy):
    """Grows the first module at step 1, with a warning."""

    def after_step(self, step):
        if step.number != 1:
            return None
        self.modules[0].grow(1, self.generator(1, 0, "grow"))
        return Event([0], np.zeros(2), "1 grew", warning="that was all")


def test_all_have_followed_an_event_when_its_warning_is_told(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Sized)
    loss_of(model, 1).backward()
    with pytest.raises(UserWarning, match="that was all"):
        optimizer.step()
    module = scheduler.session.modules[0]
    assert optimizer.state[module.factors[0]]["exp_avg"].shape == module.factors[0].shape
    assert module.births[0] == [0, 0, 1]
    assert model.peft_config["default"].rank_pattern
    optimizer.zero_grad()
    train(model, optimizer, 2, STEPS)


def test_modules_are_chosen_by_the_scores_that_a_function_gives(make_plain):
    def last_first(modules, config, plan):
        return Growth(modules, config, plan, choose_by=lambda scores: np.arange(1.0, 1.0 + len(scores)))

    torch.manual_seed(5)
    config = growing(r=3, target_modules=["lin0", "lin1"], tinit=1, deltaT=1, top_h=1)
    model = get_peft_model(make_plain(), config)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS, policy=last_first)
    train(model, optimizer, 1, 3)
    assert scheduler.ranks == {"lin0": 1, "lin1": 3}
    assert growth_history(model).scores == [[1.0, 2.0]] * 2


def test_a_state_of_another_method_is_refused_by_both_names(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Policy)
    scheduler.session.method = "other"
    state = optimizer.state_dict()
    model = adapted(make_plain)
    optimizer = adamw(model)
    attach(model, optimizer, policy=Policy)
    with pytest.raises(ValueError, match="a training with 'other', but the adapter's method is 'increlora'"):
        optimizer.load_state_dict(state)


def test_a_policy_of_tensors_goes_through_a_checkpoint_that_is_read_without_code(make_plain):
    class Kept(Policy):
        def state_dict(self):
            return {"x": [torch.arange(3.0)], "by name": {"y": 1 / 3}}

        def load_state_dict(self, state):
            self.state = state

    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Kept)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(scheduler.policy.state["x"][0], torch.arange(3.0))
    assert scheduler.policy.state["by name"] == {"y": 1 / 3}


def test_after_a_step_parameters_change_in_place_without_a_graph(make_plain):
    class Doubles(Policy):
        def after_step(self, step):
            self.modules[0].factors[1].mul_(2.0)

    model = adapted(make_plain)
    optimizer = adamw(model)
    attach(model, optimizer, policy=Doubles)
    train(model, optimizer, 1, 2)
    assert all(p.grad_fn is None for p in model.parameters())
