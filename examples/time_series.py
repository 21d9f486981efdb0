"""A neural ODE learns a pendulum from noisy series: python examples/time_series.py"""

import torch

import flows
from flows.equations import pendulum

STEPS = 200

torch.manual_seed(0)
data = flows.datasets.Pendulum(friction=0.15, num_series=40, num_times=30, noise=0.02)
field = flows.fields.Physics(pendulum, event_shape=(2,), parameters={"stiffness": 0.7, "friction": 0.0})
ode = flows.NeuralODE(field)
stage = flows.training.Stage(flows.objectives.TrajectoryMatching(), steps=STEPS, batch_size=20, learning_rate=1e-2)
reporting = flows.training.Reporting(plot_every=None)
summary = flows.Trainer(ode, data, {"matching": stage}, reporting=reporting).fit()
print({name: round(float(value), 3) for name, value in flows.evaluation.fitted_parameters(ode).items()})
with torch.no_grad():
    path = ode.trajectory(torch.tensor([[1.0, 0.0]]), torch.linspace(0, 10, 5))
print(path.states[0], path.solver_error[0], sep="\n")
