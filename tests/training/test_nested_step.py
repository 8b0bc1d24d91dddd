"""An optimizer whose step calls the step of the class it inherits from, with hooks around both."""

import pytest
import torch
from growing import growing
from increlora_rs import attach
from peft import get_peft_model


class Calling(torch.optim.AdamW):
    def step(self, closure=None):
        if getattr(self, "fails", False):
            raise RuntimeError("out of memory")
        return super().step(closure)


class Failing(torch.optim.AdamW):
    def step(self, closure=None):
        super().step(closure)
        if getattr(self, "fails", False):
            raise RuntimeError("out of memory")


@pytest.fixture
def begin(make_plain, plain_input):
    def run(cls):
        config = growing(r=3, lora_alpha=3, target_modules=["lin0", "lin1"])
        model = get_peft_model(make_plain(), config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # Having made one of the base class, torch calls its hooks around that class's step, too.
        torch.optim.AdamW(parameters)
        optimizer = cls(parameters, lr=1e-2)

        def step(closure=None):
            model(plain_input).pow(2).mean().backward()
            optimizer.step(closure)
            optimizer.zero_grad()

        return model, optimizer, attach(model, optimizer, total_steps=20), step

    return run


def test_a_step_that_calls_the_inherited_one_counts_once(begin):
    _, _, scheduler, step = begin(Calling)
    for _ in range(5):
        step()
    assert scheduler.step == 5


def test_it_trains_as_the_inherited_one_does(begin):
    results = []
    for cls in (torch.optim.AdamW, Calling):
        torch.manual_seed(0)
        model, _, scheduler, step = begin(cls)
        for _ in range(20):
            step()
        results.append((scheduler.history.tolist(), [p.detach() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(
        torch.equal(plain, calling) for plain, calling in zip(results[0][1], results[1][1], strict=True)
    )


@pytest.mark.parametrize("cls", [Calling, Failing])
def test_after_a_step_that_raised_steps_count_as_before(begin, cls):
    _, optimizer, scheduler, step = begin(cls)
    step()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    optimizer.fails = False
    taken = scheduler.step
    for _ in range(3):
        step()
    assert scheduler.step == taken + 3
