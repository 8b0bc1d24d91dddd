"""The method as the spec states it, in plain PyTorch, float64, dW materialised: own code, slow, exact.

Every set of components born together is a parameter of its own with an optimizer of its own, as if it
had just been made; nothing is corrected afterwards.
"""

import torch
from torch import nn

RESERVE_E = 1e-5


class Piece:
    """Components of one module that were born together."""

    def __init__(self, a, b, birth, e=None):
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(b.clone())
        self.e = None if e is None else nn.Parameter(e.clone())
        self.birth = birth
        self.e_birth = birth

    @property
    def size(self):
        return self.a.shape[0]

    def values(self):
        constant = torch.full((self.size, 1), RESERVE_E, dtype=self.a.dtype)
        return self.a, self.b, constant if self.e is None else self.e


class Module:
    def __init__(self, weight, bias, a, b, e):
        self.weight, self.bias = weight, bias
        self.pieces = [Piece(a, b, 0, e)]

    @property
    def rank(self):
        return sum(piece.size for piece in self.pieces if piece.e is not None)

    def factors(self):
        a, b, e = zip(*(piece.values() for piece in self.pieces), strict=True)
        return torch.cat(a), torch.cat(b, 1), torch.cat(e)


class Reference:
    """Trains ``modules``, a chain of linear maps with tanh between them, beside the code under test.

    Args:
        make_optimizer: Optimizer of one parameter at the initial learning rate.
        multiplier: The learning rate's multiplier at step t, the first is 1.
        config: alpha, budget rank r, scaling, preserve_output, orth weight, betas, advance, restart.
        schedule: tinit, deltaT, top_h, add_r.
    """

    def __init__(self, modules, make_optimizer, *, lr, multiplier, warmup, total, linear, config, schedule):
        self.modules = modules
        self.make_optimizer = make_optimizer
        self.lr, self.multiplier = lr, multiplier
        self.warmup, self.total, self.linear = warmup, total, linear
        self.config, self.schedule = config, schedule
        self.budget = config["r"] * len(modules)
        self.mean = [0.0] * len(modules)
        self.uncertainty = [0.0] * len(modules)
        self.optimizers = {}
        self.chosen = []

    @property
    def total_rank(self):
        return sum(module.rank for module in self.modules)

    @property
    def scores(self):
        return [m * u for m, u in zip(self.mean, self.uncertainty, strict=True)]

    def scale(self, module):
        rank = self.config["r"] if self.config["scaling"] == "budget" else module.rank
        return self.config["alpha"] / rank

    def step(self, t, x, target):
        deltas = []
        for module in self.modules:
            a, b, e = module.factors()
            delta = self.scale(module) * b @ torch.diag(e.view(-1)) @ a
            delta.retain_grad()
            deltas.append(delta)
            x = x @ (module.weight + delta).t() + module.bias
            if module is not self.modules[-1]:
                x = torch.tanh(x)
        loss = nn.functional.mse_loss(x, target)
        loss.backward()
        growing = self.total_rank < self.budget
        if growing:
            self.smooth(deltas)
        self.add_regulariser()
        for module in self.modules:
            for piece in module.pieces:
                self.update(piece.a, piece.birth, t)
                self.update(piece.b, piece.birth, t)
                if piece.e is not None:
                    self.update(piece.e, piece.e_birth, t)
        tinit, interval, top_h, add_r = self.schedule
        if growing and t > tinit and t % interval == 0:
            return self.choose(top_h, add_r)
        return []

    def smooth(self, deltas):
        beta1, beta2 = self.config["betas"]
        for k, delta in enumerate(deltas):
            value = (delta * delta.grad).abs().sum().item() / delta.numel() ** 0.5
            self.mean[k] = beta1 * self.mean[k] + (1 - beta1) * value
            self.uncertainty[k] = beta2 * self.uncertainty[k] + (1 - beta2) * abs(value - self.mean[k])

    def add_regulariser(self):
        weight = self.config["orth"]
        if not weight:
            return
        norms = []
        for module in self.modules:
            a, b, _ = module.factors()
            eye = torch.eye(a.shape[0], dtype=a.dtype)
            norms += [torch.linalg.norm(a @ a.t() - eye), torch.linalg.norm(b.t() @ b - eye)]
        (weight * torch.stack(norms).mean()).backward()

    def update(self, parameter, birth, t):
        optimizer = self.optimizers.get(parameter)
        if optimizer is None:
            optimizer = self.optimizers[parameter] = self.make_optimizer(parameter)
        optimizer.param_groups[0]["lr"] = self.lr * self.own_multiplier(birth, t)
        optimizer.step()
        optimizer.zero_grad()

    def own_multiplier(self, birth, t):
        if birth == 0 or not self.config["restart"]:
            return self.multiplier(t)
        age = t - birth
        if self.linear:
            if age < self.warmup:
                return age / self.warmup
            return (self.total - birth - age) / (self.total - birth - self.warmup)
        return self.multiplier(t) * min(1.0, age / self.warmup if self.warmup else 1.0)

    def choose(self, top_h, add_r):
        order = sorted(range(len(self.modules)), key=lambda k: (-self.scores[k], k))
        left = self.budget - self.total_rank
        chosen = []
        for k in order:
            module = self.modules[k]
            room = min(module.weight.shape) - module.rank
            gain = min(add_r, room, left)
            if gain > 0 and len(chosen) < top_h:
                chosen.append((k, gain))
                left -= gain
        self.chosen.append(tuple(k for k, _ in chosen))
        return chosen

    def grow(self, t, k, gain, new):
        """Module ``k`` gains ``gain`` components; ``new(n)`` gives A, B, E of n newborn ones."""
        module = self.modules[k]
        before = self.scale(module)
        old = [piece for piece in module.pieces if piece.e is not None]
        for piece in list(module.pieces):
            if piece.e is None and gain:
                if piece.size > gain:
                    rest = Piece(piece.a.detach()[gain:], piece.b.detach()[:, gain:], piece.birth)
                    raise AssertionError(f"a reserve of {piece.size} was split: {rest.size} left")
                piece.e = nn.Parameter(torch.full((piece.size, 1), RESERVE_E, dtype=piece.a.dtype))
                piece.e_birth = t
                gain -= piece.size
        if gain:
            a, b, e = new(gain)
            module.pieces.append(Piece(a, b, t, e))
        if self.config["preserve_output"]:
            with torch.no_grad():
                for piece in old:
                    piece.e.mul_(before / self.scale(module))

    def add_reserve(self, t, k, a, b):
        self.modules[k].pieces.append(Piece(a, b, t))

    def drop_reserves(self):
        for module in self.modules:
            module.pieces = [piece for piece in module.pieces if piece.e is not None]
