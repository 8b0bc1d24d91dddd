"""An optimizer's state after rows left a parameter anywhere, and others came: those that stay keep theirs."""

import pytest
import torch
from increlora_rs import attach
from increlora_rs.resizing.optimizer_state import resize_state, watch
from increlora_rs.resizing.parameter import append, select
from moving import MOVES, STEPS, Moving, adapted, backward, trainable
from torch import nn
from transformers import Adafactor as TransformersAdafactor

KEEP = [0, 2, 3]


def optional(path, name, **arguments):
    def make(parameters):
        return getattr(pytest.importorskip(path), name)(parameters, **({"lr": 1e-2} | arguments))

    return make


# How a new row's state starts, by key: a number, "row" for the row itself; None: not known: a parameter
# with new rows starts anew. None for all keys: one that lost rows does, too.
OPTIMIZERS = {
    "AdamW": (optional("torch.optim", "AdamW"), {"exp_avg": 0, "exp_avg_sq": 0}),
    "AdamW fused": (optional("torch.optim", "AdamW", fused=True), {"exp_avg": 0, "exp_avg_sq": 0}),
    "Adam amsgrad": (
        optional("torch.optim", "Adam", amsgrad=True),
        {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0},
    ),
    "SGD momentum": (optional("torch.optim", "SGD", momentum=0.9), {"momentum_buffer": 0}),
    "SGD": (optional("torch.optim", "SGD"), {}),
    "Adagrad": (optional("torch.optim", "Adagrad", initial_accumulator_value=0.3), {"sum": 0.3}),
    "Rprop": (optional("torch.optim", "Rprop"), {"prev": 0, "step_size": 1e-2}),
    "ASGD": (optional("torch.optim", "ASGD"), {"ax": "row"}),
    "Lion": (optional("lion_pytorch", "Lion"), {"exp_avg": 0}),
    "schedule-free": (optional("schedulefree", "AdamWScheduleFree"), {"z": "row", "exp_avg_sq": 0}),
    "Adafactor": (optional("torch.optim", "Adafactor"), None),
    "transformers' Adafactor": (lambda p: TransformersAdafactor(p, lr=1e-2, relative_step=False), None),
    "dampened SGD": (
        optional("torch.optim", "SGD", momentum=0.9, dampening=0.5),
        {"momentum_buffer": None},
    ),
}


class ByHand:
    """The training written down: after each move parameters, optimizer and state are made anew, row by row.

    It takes the gradients, and the values of new rows, from the training under test.
    """

    def __init__(self, parameters, make, starts):
        self.make, self.starts = make, starts
        self.parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.optimizer = make(self.parameters)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def step(self, gradients):
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def move(self, keep, gained):
        """``keep``, ``gained``: of each parameter the positions of the rows that stay, and the new rows."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        old, self.parameters = self.parameters, []
        of_all = list(zip(old, keep, gained, (0, 1, 0) * 2, strict=True))
        for p, rows, new, dim in of_all:
            self.parameters.append(nn.Parameter(chosen(p.detach(), rows, dim, new)))
        self.optimizer = self.make(self.parameters)
        self.optimizer.param_groups[0].update(group)
        for parameter, (_, rows, new, dim), state in zip(self.parameters, of_all, states, strict=True):
            unknown = self.starts is None or (new.numel() and None in self.starts.values())
            if rows is not None and unknown:
                continue
            made = {}
            for key, value in state.items():
                if rows is not None and isinstance(value, torch.Tensor) and value.dim() == 2:
                    start = self.starts[key]
                    begun = torch.full_like(new, start) if isinstance(start, (int, float)) else new
                    made[key] = chosen(value, rows, dim, begun)
                else:
                    made[key] = value
            if made:
                self.optimizer.state[parameter] = made


def chosen(value, rows, dim, new):
    if rows is None:
        return value.clone()
    return torch.cat([value.index_select(dim, torch.tensor(rows)), new], dim)


def moved(parameters, move):
    """Of each parameter of the test: which rows stay (None: it is untouched), and its new rows."""
    loses, position, gains = move
    keep, gained = [], []
    for i, parameter in enumerate(parameters):
        module, dim = i // 3, (0, 1, 0)[i % 3]
        size = parameter.shape[dim]
        new = 1 if module == gains else 0
        before = size - new + (1 if module == loses else 0)
        rows = [k for k in range(before) if module != loses or k != position]
        keep.append(rows if module in (loses, gains) else None)
        gained.append(parameter.detach().narrow(dim, size - new, new).clone())
    return keep, gained


@pytest.mark.filterwarnings("ignore:the state .* cannot follow")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_with_moves_is_the_one_written_down_bit_for_bit(make_plain, name):
    make, starts = OPTIMIZERS[name]
    model = adapted(make_plain)
    parameters = trainable(model)
    optimizer = make(parameters)
    attach(model, optimizer, policy=Moving)
    if hasattr(optimizer, "train"):
        optimizer.train()
    literal = ByHand(parameters, make, starts)
    for number in range(1, STEPS + 1):
        backward(model, number)
        literal.step([p.grad.clone() for p in parameters])
        optimizer.step()
        if number in MOVES:
            literal.move(*moved(parameters, MOVES[number]))
        optimizer.zero_grad()
        for mine, theirs in zip(parameters, literal.parameters, strict=True):
            assert torch.equal(mine, theirs), number
            have, want = optimizer.state.get(mine, {}), literal.optimizer.state.get(theirs, {})
            assert set(have) == set(want)
            for key, value in have.items():
                same = torch.equal(value, want[key]) if torch.is_tensor(value) else value == want[key]
                assert same, (number, key)


# One parameter.

SHAPES = {
    "A": (lambda rank: (rank, 6), 0),
    "B": (lambda rank: (6, rank), 1),
    "E": (lambda rank: (rank, 1), 0),
}


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(make, shape):
    parameter = nn.Parameter(numbers(shape, 0))
    watch(parameter)
    optimizer = make([parameter])
    for step in range(3):
        parameter.grad = numbers(shape, 10 + step)
        optimizer.step()
    return parameter, optimizer


def replaced(parameter, shape, dim):
    """Takes rows away and puts as many in, so that the size is what it was."""
    select(parameter, KEEP, dim)
    append(parameter, numbers(shape(2), 30), dim)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", SHAPES)
@pytest.mark.parametrize("path", ["prodigyopt.Prodigy", "bitsandbytes.optim.AdEMAMix"])
def test_state_that_lies_flat_or_stacked_follows_by_position(path, factor):
    module, _, name = path.rpartition(".")
    shape, dim = SHAPES[factor]
    parameter, optimizer = stepped(optional(module, name), shape(5))
    state = optimizer.state[parameter]
    before = {key: value.clone() for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    replaced(parameter, shape, dim)
    resize_state(optimizer, parameter, dim, 1.0, KEEP)
    assert before
    for key, value in before.items():
        lead = value.shape[:1] if value.dim() == 3 else ()
        old, new = value.view(*lead, *shape(5)), state[key].view(*lead, *shape(5))
        along = dim + len(lead)
        kept = old.index_select(along, torch.tensor(KEEP))
        assert torch.equal(new.narrow(along, 0, 3), kept), key


def test_weights_that_follow_a_scale_do_so_in_the_rows_that_stay():
    parameter, optimizer = stepped(optional("torch.optim", "ASGD"), (5, 1))
    before = optimizer.state[parameter]["ax"].clone()
    replaced(parameter, SHAPES["E"][0], 0)
    resize_state(optimizer, parameter, 0, 0.5, KEEP)
    assert torch.equal(optimizer.state[parameter]["ax"][:3], before[KEEP] * 0.5)


def test_a_state_that_has_not_the_rows_that_stay_is_dropped_with_a_warning():
    parameter, optimizer = stepped(optional("torch.optim", "AdamW"), (2, 6))
    with pytest.warns(UserWarning, match="has not all of the rows that stayed.*starts anew"):
        resize_state(optimizer, parameter, 0, 1.0, [0, 3])
    assert parameter not in optimizer.state


# The net under optimizers that no scheduler looks after.


def test_state_of_rows_that_are_gone_is_dropped_though_its_size_fits():
    parameter, optimizer = stepped(optional("torch.optim", "AdamW"), (5, 6))
    replaced(parameter, SHAPES["A"][0], 0)
    parameter.grad = numbers((5, 6), 20)
    with pytest.warns(UserWarning, match="'exp_avg' of AdamW is of rows that its parameter no longer has"):
        optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 1.0


@pytest.mark.filterwarnings("error")
def test_state_that_followed_or_was_loaded_since_is_kept():
    parameter, optimizer = stepped(optional("torch.optim", "AdamW"), (5, 6))
    replaced(parameter, SHAPES["A"][0], 0)
    resize_state(optimizer, parameter, 0, 1.0, KEEP)
    parameter.grad = numbers((5, 6), 20)
    optimizer.step()
    replaced(parameter, SHAPES["A"][0], 0)
    optimizer.load_state_dict(optimizer.state_dict())
    parameter.grad = numbers((5, 6), 21)
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 5.0
