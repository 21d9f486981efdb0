"""Programs of `torch.export` compute what the flow computes."""

import io

import pytest
import torch

import flows
from flows import fields, transforms
from flows.errors import ComputationError, FlowsError

COARSE = flows.ODESolver("midpoint", step_size=0.5)


def flow(**options):
    transform = transforms.Standardise(2).fit(torch.randn(50, 2) * 3 + 1)
    return flows.CNF(fields.MLP(2, hidden=(4,)), solver=COARSE, transform=transform, **options)


def program(model, what):
    """As another process would run it."""
    file = io.BytesIO()
    torch.export.save(flows.export(model, what), file)
    file.seek(0)
    return torch.export.load(file).module()


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_field():
    model, t = flow(), torch.tensor(0.3)
    found = program(model, "field")
    for batch in (1, 6):
        y = torch.randn(batch, 2)
        torch.testing.assert_close(found(t, y), model.field(t, y))


@pytest.mark.slow
def test_samples_and_densities():
    model = flow(base="student_t")
    z, x = model.base.sample((6,), seeded()), torch.randn(3, 2)
    torch.testing.assert_close(program(model, "sample")(z), model.sample(6, generator=seeded()))
    torch.testing.assert_close(program(model, "log_prob")(x), model.log_prob(x))


@pytest.mark.slow
def test_contexts_in_data_units():
    encoder = flows.encoders.Standardised(3).fit(5 + torch.randn(20, 3))
    model = flows.CNF(fields.MLP(2, hidden=(4,), context_shape=3), solver=COARSE, encoder=encoder)
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(program(model, "log_prob")(x, context), model.log_prob(x, context))
    t = torch.tensor(0.5)
    torch.testing.assert_close(program(model, "field")(t, x, context), model.field(t, x, model.encode(context)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", [fields.ConvNet((1, 4, 4), hidden=(4,)), fields.Hollow(2, hidden=(8,)), fields.Potential(2, width=8)]
)
def test_other_fields(field):
    model = flows.CNF(field, solver=COARSE).double()
    z = model.base.sample((6,), seeded())
    torch.testing.assert_close(program(model, "sample")(z), model.sample(6, generator=seeded()))


class Counts(fields.Field):
    def forward(self, t, x, context=None):
        return x * len(x)


class Decides(fields.Field):
    def forward(self, t, x, context=None):
        return x if x.sum() > 0 else -x


def dequantised():
    parts = transforms.Compose(noise=transforms.Dequantise(16), unit=transforms.UnitInterval(16))
    return flows.CNF(fields.ConvNet((1, 4, 4), hidden=(4,)), solver=COARSE, transform=parts)


REFUSED = {
    "steps": (lambda: (flows.CNF("mlp", event_shape=2), "sample"), "its steps depend on the data; choose fixed steps"),
    "noise": (lambda: (dequantised(), "sample"), "its transform draws noise; export its field"),
    "closed form": (
        lambda: (flows.CNF(fields.ConvNet((1, 4, 4), hidden=(4,)), solver=COARSE), "log_prob"),
        "a divergence in closed form, and ConvNet has none",
    ),
    "source": (lambda: (flow(base=flows.bases.Empirical(points=torch.randn(9, 2))), "log_prob"), "has no density"),
    "a neural ODE": (lambda: (flows.NeuralODE("mlp", event_shape=2), "sample"), "has no sample; export its field"),
    "what": (lambda: (flow(), "samples"), "what must be 'field', 'sample' or 'log_prob', got 'samples'"),
}


@pytest.mark.parametrize(("make", "words"), [*REFUSED.values()], ids=[*REFUSED])
def test_the_rest_says_why_not(make, words):
    with pytest.raises(FlowsError, match=words):
        flows.export(*make())


def test_fields_that_decide_by_values_cannot_be_exported():
    model = flows.CNF(Decides(2, None), solver=COARSE)
    with pytest.raises(ComputationError, match="torch cannot export the field Decides"):
        flows.export(model, "field")
    model.field.__class__ = Counts
    with pytest.raises(ComputationError, match=r"the size of a batch is x.shape\[0\], not len\(x\)"):
        flows.export(model, "field")


def test_categories_cannot_be_looked_up():
    conditions = flows.conditions.Conditions(["sex"], {"sex": ["f", "m"]})
    encoder = flows.encoders.Standardised(1, conditions=conditions)
    model = flows.CNF(fields.MLP(2, hidden=(4,), context_shape=2), encoder=encoder)
    with pytest.raises(FlowsError, match=r"looks up categories .*flow.encode\(context\)"):
        flows.export(model, "field")
