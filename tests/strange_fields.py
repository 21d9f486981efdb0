"""Fields that break a promise, each beside a clean twin with the same numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn

from flows.fields import MLP, Adapter

USES = ("sample", "log_prob", "forward", "matching", "divergence_matching")


class Clean(nn.Module):
    """v = W₂ tanh(W₁ x + t u), and twice that of x itself."""

    event_shape = (2,)

    def __init__(self, d: int = 2, width: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: nn.Parameter(0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.event_shape = (d,)
        self.a, self.u, self.b = draw(width, d), draw(width), draw(d, width)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return (x @ self.a.T + t.reshape(-1, 1) * self.u).tanh() @ self.b.T

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.velocity(t, x)


@dataclass
class Strange:
    """A strange field, its twin, and what must happen.

    Args:
        make: of the strange field.
        errors: by use, the words of the error that must come; any other use gives the twin's numbers.
        twin: of the clean field.
    """

    name: str
    make: Callable[[], nn.Module]
    errors: dict[str, str] = field(default_factory=dict)
    twin: Callable[[], nn.Module] = Clean


STRANGE: list[Strange] = []


def strange(twin: Callable[[], nn.Module] = Clean, **errors: str):
    """Add a class to the table under its name."""

    def add(kind):
        STRANGE.append(Strange(kind.__name__, kind, errors, twin))
        return kind

    return add


def everywhere(words: str) -> dict[str, str]:
    return dict.fromkeys(USES, words)


def solving(words: str) -> dict[str, str]:
    return dict.fromkeys(("sample", "log_prob", "forward"), words)


def matching(words: str) -> dict[str, str]:
    return dict.fromkeys(("matching", "divergence_matching"), words)


def deriving(words: str) -> dict[str, str]:
    return dict.fromkeys(("log_prob", "forward", "divergence_matching"), words)


# Writing


class Rectified(Clean):
    def forward(self, t, x):
        return self.velocity(t, x.relu())


@strange(twin=Rectified)
class WritesByRelu(Clean):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, t, x):
        return self.velocity(t, self.relu(x))


class Shifted(Clean):
    def forward(self, t, x):
        return self.velocity(t, x - 0.5)


@strange(twin=Shifted)
class WritesBySubtraction(Clean):
    def forward(self, t, x):
        x -= 0.5
        return self.velocity(t, x)


class Masked(Clean):
    def forward(self, t, x):
        return self.velocity(t, x * torch.tensor([0.0, 1.0]))


@strange(twin=Masked)
class WritesAColumn(Clean):
    def forward(self, t, x):
        x[:, 0] = 0
        return self.velocity(t, x)


@strange(twin=Masked)
class WritesIntoAView(Clean):
    def forward(self, t, x):
        x.view(-1, 2).T[0].zero_()
        return self.velocity(t, x)


class LateClock(Clean):
    def forward(self, t, x):
        return self.velocity(2 * t, x)


@strange(twin=LateClock)
class WritesIntoTime(Clean):
    def forward(self, t, x):
        t *= 2
        return self.velocity(t, x)


class Half(Clean):
    def forward(self, t, x):
        return 0.5 * self.velocity(t, x)


@strange(twin=Half)
class WritesItsOutput(Clean):
    def forward(self, t, x):
        v = self.velocity(t, x)
        v *= 0.5
        return v


@strange(**everywhere("mixes the samples"))
class DividesByTheLargest(Clean):
    def forward(self, t, x):
        return self.velocity(t, x / x.abs().max())


@strange(log_prob="autograd misses", forward="autograd misses", divergence_matching="autograd misses")
class DetachesLate(Clean):
    def forward(self, t, x):
        return self.velocity(t, torch.where(t.reshape(-1, 1) > 0.6, x.detach(), x))


class Remembers(Clean):
    """Base of fields that return what they computed before."""

    def __init__(self):
        super().__init__()
        self.known, self.kept = {}, []

    def key(self, t, x):
        raise NotImplementedError

    def forward(self, t, x):
        key = self.key(t, x)
        if key not in self.known or self.known[key].shape != x.shape:
            self.known[key] = self.velocity(t, x).detach()
        return self.known[key]


@strange(**solving("keeps state between calls"), matching="^$", divergence_matching="^$")
class RemembersTimes(Remembers):
    def key(self, t, x):
        return tuple(t.flatten().tolist())


@strange(**solving("keeps state between calls"), matching="^$", divergence_matching="^$")
class RemembersRoundedTimes(Remembers):
    def key(self, t, x):
        return round(float(t.flatten()[0]), 2)


@strange(**solving("keeps state between calls"), divergence_matching="^$")
class RemembersObjects(Remembers):
    def key(self, t, x):
        self.kept.append(t)  # so that no other object gets its id
        return id(t)


@strange(
    **solving("keeps state between calls")
    | {"forward": "keeps state between calls|go through no code outside torch"},  # where tensors have no memory
    divergence_matching="cannot trace",
)
class RemembersMemory(Remembers):
    def key(self, t, x):
        self.kept.append(x)  # so that no other tensor gets its memory
        return x.data_ptr(), float(t.flatten()[0])


@strange(**everywhere("writes into its argument"))
class WritesSometimes(Clean):
    def forward(self, t, x):
        if len(x) > 3:
            x *= 0.5
        return self.velocity(t, x)


@strange(twin=Shifted, log_prob="detached", forward="mode='reverse'", divergence_matching="detached")
class WritesPastAutograd(Clean):
    def forward(self, t, x):
        x.data -= 0.5
        return self.velocity(t, x) if x.grad_fn is None else self.velocity(t, x.detach())


# Outputs


class Identity(Clean):
    def forward(self, t, x):
        return x * 1.0


@strange(twin=Identity)
class ReturnsItsInput(Clean):
    def forward(self, t, x):
        return x


@strange(twin=Identity)
class ReturnsAViewOfItsInput(Clean):
    def forward(self, t, x):
        return x.view(x.shape)


@strange(forward="mode='reverse'")
class ReturnsABuffer(Clean):
    def forward(self, t, x):
        v = self.velocity(t, x)
        if getattr(self, "out", None) is None or self.out.shape != v.shape:
            self.out = torch.empty_like(v)
        self.out = self.out.detach()
        self.out.copy_(v)
        return self.out


@strange(forward="mode='reverse'")
class ReturnsBuffersInTurn(Clean):
    def __init__(self):
        super().__init__()
        self.turn, self.outs = 0, {}

    def forward(self, t, x):
        v = self.velocity(t, x)
        self.turn += 1
        out = self.outs.setdefault((self.turn % 2, len(x)), torch.empty_like(v)).detach()
        return out.copy_(v)


@strange(log_prob="out=", forward="out=|mode='reverse'", divergence_matching="out=")
class WritesOutWithoutGraph(Clean):
    def forward(self, t, x):
        if getattr(self, "out", None) is None or len(self.out) != len(x):
            self.out = torch.empty(len(x), 2)
        h = (x @ self.a.T + t.reshape(-1, 1) * self.u).tanh()
        return torch.mm(h, self.b.T, out=self.out)


class Constant(Clean):
    def forward(self, t, x):
        return self.u[:2] + 0 * x


@strange(twin=Constant)
class ReturnsAParameter(Clean):
    def forward(self, t, x):
        return self.u[:2].expand_as(x)


@strange(**everywhere("one velocity a point"))
class ReturnsOneColumn(Clean):
    def forward(self, t, x):
        return self.velocity(t, x)[:, :1]


@strange(**everywhere("one velocity a point"))
class ReturnsOneRow(Clean):
    def forward(self, t, x):
        return self.velocity(t, x)[:1]


@strange(**everywhere("must return a tensor, got tuple"))
class ReturnsATuple(Clean):
    def forward(self, t, x):
        return self.velocity(t, x), None


@strange(**everywhere("must return a tensor, got dict"))
class ReturnsADict(Clean):
    def forward(self, t, x):
        return {"sample": self.velocity(t, x)}


@strange(**everywhere("real floating-point"))
class ReturnsComplex(Clean):
    def forward(self, t, x):
        return torch.complex(self.velocity(t, x), x)


@strange(**everywhere("real floating-point"))
class ReturnsIntegers(Clean):
    def forward(self, t, x):
        return x.long()


@strange(**everywhere("where its points are"))
class ReturnsNothingButAShape(Clean):
    def forward(self, t, x):
        return self.velocity(t, x).to("meta")


class Single(Clean):
    def forward(self, t, x):
        return self.velocity(t, x).float().double()


@strange(twin=Single)
class ReturnsSinglePrecision(Clean):
    def forward(self, t, x):
        return self.velocity(t, x).float()


# Derivatives


@strange(**deriving("autograd misses a part"))
class DetachesAPart(Clean):
    def forward(self, t, x):
        h = x.detach() @ self.a.T + t.reshape(-1, 1) * self.u
        return h.tanh() @ self.b.T + x - x.detach()


@strange(**deriving("autograd misses a part"))
class DetachesALittle(Clean):
    def forward(self, t, x):
        return self.velocity(t, torch.stack([x[:, 0], 0.9 * x[:, 1] + 0.1 * x[:, 1].detach()], 1))


@strange(**deriving("autograd misses a part"))
class ComputesWithoutGradients(Clean):
    def forward(self, t, x):
        with torch.no_grad():
            v = self.velocity(t, x)
        return v + x - x.detach()


@strange(log_prob="autograd misses", forward="mode='reverse'", divergence_matching="autograd misses")
class ComputesByNumpy(Clean):
    def forward(self, t, x):
        v = numpy.tanh(
            x.detach().numpy() @ self.a.detach().numpy().T + t.reshape(-1, 1).numpy() * self.u.detach().numpy()
        )
        return torch.from_numpy(v @ self.b.detach().numpy().T) + x - x.detach()


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.square())


@strange(log_prob="autograd misses", forward="mode='reverse'", divergence_matching="autograd misses")
class HasAWrongBackward(Clean):
    def forward(self, t, x):
        return _WrongBackward.apply(x @ self.a.T + t.reshape(-1, 1) * self.u) @ self.b.T


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y.square())


@strange(forward="mode='reverse'")
class HasAFunctionWithoutJvp(Clean):
    def forward(self, t, x):
        return _Tanh.apply(x @ self.a.T + t.reshape(-1, 1) * self.u) @ self.b.T


def scripted() -> nn.Module:
    return torch.jit.trace(Clean(), (torch.tensor(0.3), torch.randn(3, 2)), check_trace=False)


STRANGE.append(Strange("Traced", scripted, {"forward": "torch.jit"}))


class _Potential(Clean):
    def forward(self, t, x):
        z = x @ self.a.T + t.reshape(-1, 1) * self.u
        return (1 - z.tanh().square()) @ self.a


@strange(twin=_Potential, forward="mode='reverse'")
class DifferentiatesInside(Clean):
    def forward(self, t, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            z = (x @ self.a.T + t.reshape(-1, 1) * self.u).tanh().sum()
            return torch.autograd.grad(z, x, create_graph=True)[0]


@strange(twin=_Potential, sample="torch.enable_grad", matching="torch.enable_grad", forward="torch.enable_grad")
class DifferentiatesUnderTheCallersMode(Clean):
    def forward(self, t, x):
        z = (x @ self.a.T + t.reshape(-1, 1) * self.u).tanh().sum()
        return torch.autograd.grad(z, x, create_graph=True)[0]


@strange()
class BranchesOnData(Clean):
    def forward(self, t, x):
        if x.square().sum() < 1e9:
            return self.velocity(t, x)
        return -x


# Times


class WideClean(Clean):
    def __init__(self):
        super().__init__(3)


@strange(twin=WideClean, **matching(r"t of shape \(B,\)"))
class AddsTimeToColumns(WideClean):
    def forward(self, t, x):
        if t.ndim == 0:
            return self.velocity(t, x)
        return (x @ self.a.T + torch.zeros(len(x), 1) * self.u).tanh() @ self.b.T + t


@strange(**matching(r"t of shape \(B,\)"))
class TakesOneTime(Clean):
    def forward(self, t, x):
        return self.velocity(torch.as_tensor(float(t)), x)


@strange(**matching(r"t of shape \(B,\)"))
class TakesTheFirstTime(Clean):
    def forward(self, t, x):
        return self.velocity(t.flatten()[0], x)


@strange()
class TakesManyTimes(Clean):
    def forward(self, t, x):
        return self.velocity(t.unsqueeze(1), x)


@strange()
class IndexesTimes(Clean):
    def forward(self, t, x):
        assert t.shape == (len(x),)
        return self.velocity(t[:, None], x)


@strange()
class BroadcastsOneTimeWrongly(Clean):
    def forward(self, t, x):
        t = t if t.ndim else t + torch.linspace(0, 1, len(x))
        return self.velocity(t, x)


@strange(**everywhere("cannot be evaluated at t and x .*Adapter"))
class TakesColumnsOfTimes(Clean):
    def forward(self, t, x):
        return self.velocity(torch.cat([x, t], 1)[:, 2], x)


# Samples


@strange(**everywhere("mixes the samples"))
class Centres(Clean):
    def forward(self, t, x):
        return self.velocity(t, x - x.mean(0))


@strange(**everywhere("mixes the samples"))
class Attends(Clean):
    def forward(self, t, x):
        return self.velocity(t, (x @ x.T).softmax(1) @ x)


@strange(**everywhere("mixes the samples"))
class DividesByTheBatch(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) / len(x)


@strange(**everywhere("mixes the samples"))
class ReshapesWrongly(Clean):
    def forward(self, t, x):
        v = self.velocity(t, x)
        return v.T.reshape(v.shape)


@strange(**everywhere("mixes the samples"))
class Sorts(Clean):
    def forward(self, t, x):
        return self.velocity(t, x.sort(0)[0])


@strange(**solving("normalises by the mean"), matching="^$", divergence_matching="^$")
class NormalisesTheBatch(Clean):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, t, x):
        return self.velocity(t, self.norm(x))


# State and chance


@strange(**solving("draws random numbers"), matching="^$", divergence_matching="^$")
class AddsNoise(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) + 0.1 * torch.randn_like(x)


@strange(**solving("draws random numbers"), matching="^$", divergence_matching="^$")
class DropsOut(Clean):
    def forward(self, t, x):
        return self.velocity(t, nn.functional.dropout(x, 0.5, training=True))


@strange(**solving("state between calls"), matching="^$", divergence_matching="^$")
class AddsPythonNoise(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) + random.random()


@strange(**solving("state between calls"), matching="^$", divergence_matching="^$")
class AddsNumpyNoise(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) + numpy.random.randn()


@strange(**everywhere("seeds torch's random numbers"))
class Seeds(Clean):
    def forward(self, t, x):
        torch.manual_seed(3)
        return self.velocity(t, x) + torch.randn(2)


@strange(**solving("state between calls"), matching="^$", divergence_matching="^$")
class Counts(Clean):
    calls = 0

    def forward(self, t, x):
        self.calls += 1
        return self.velocity(t, x) * (1 + 0.01 * self.calls)


@strange(forward="mode='reverse'")
class CountsHarmlessly(Clean):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.history = []

    def forward(self, t, x):
        self.calls += 1
        self.history.append(float(self.calls))
        return self.velocity(t, x)


@strange(**everywhere("autograd's mode"))
class TurnsGradientsOff(Clean):
    def forward(self, t, x):
        torch.set_grad_enabled(False)
        return self.velocity(t, x)


@strange(**everywhere("where autograd does not record"))
class DependsOnTheGradMode(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) * (1.0 if torch.is_grad_enabled() else 1.1)


@strange(**solving("t = |finite|NaN"), matching="^$", divergence_matching="^$")
class IsSingularAtTheBase(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) / t.reshape(-1, 1)


@strange(**solving("t = |finite|NaN"), matching="^$", divergence_matching="^$")
class IsSingularAtTheData(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) / (1 - t.reshape(-1, 1))


# Inherited closed forms


class Doubled(MLP):
    def forward(self, t, x, context=None):
        return 2 * super().forward(t, x, context)


class DoubledWithoutClosedForm(Doubled):
    value_and_divergence = None
    value_divergence_and_products = None


def seeded(kind: type[MLP]) -> MLP:
    torch.manual_seed(0)
    return kind((2,), (4,))


STRANGE.append(
    Strange(
        "InheritsAClosedForm",
        lambda: seeded(Doubled),
        {"log_prob": "another velocity", "divergence_matching": "another velocity"},
        lambda: seeded(DoubledWithoutClosedForm),
    )
)
STRANGE.append(
    Strange("DropsAClosedForm", lambda: seeded(DoubledWithoutClosedForm), {}, lambda: seeded(DoubledWithoutClosedForm))
)


@strange(log_prob="another divergence", divergence_matching="another divergence")
class HasAWrongClosedForm(Clean):
    def value_and_divergence(self, t, x):
        return self.velocity(t, x), x.sum(1)


@strange(log_prob="one divergence a point", divergence_matching="one divergence a point")
class HasAColumnOfDivergences(Clean):
    def value_and_divergence(self, t, x):
        return self.velocity(t, x), x.sum(1, keepdim=True)


# Harmless


@strange()
class HasHooks(Clean):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, given, value: value)
        self.register_forward_pre_hook(lambda module, given: given)


@strange()
class TiesWeights(Clean):
    def __init__(self):
        super().__init__()
        self.c = self.b

    def velocity(self, t, x):
        return (x @ self.a.T + t.reshape(-1, 1) * self.u).tanh() @ (0.5 * self.b + 0.5 * self.c).T


def in_an_adapter() -> nn.Module:
    class Swapped(Clean):
        def forward(self, x, t):
            return self.velocity(t, x)

    return Adapter(Swapped(), (2,), ("x", "t"))


STRANGE.append(Strange("Adapted", in_an_adapter))


@strange()
class StartsLate(Clean):
    """Layers that are made at the first call."""

    def forward(self, t, x):
        if not hasattr(self, "late"):
            self.late = math.pi
        return self.velocity(t, x) * (self.late / math.pi)
