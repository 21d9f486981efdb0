"""What made this observation? A simulator and its posterior: python examples/posterior_of_a_simulator.py"""

import torch
from torch.distributions import Independent, Uniform

import flows

STEPS, SIMULATIONS = 500, 2000


def throw(theta: torch.Tensor) -> torch.Tensor:
    """Where a ball lands that is thrown with the speed and the angle theta, measured twice."""
    speed, angle = theta[..., 0], theta[..., 1]
    distance = speed**2 * torch.sin(2 * angle) / 9.81
    return distance[..., None] + 0.1 * torch.randn(*distance.shape, 2)


torch.manual_seed(0)
prior = Independent(Uniform(torch.tensor([1.0, 0.2]), torch.tensor([5.0, 1.4])), 1)
posterior = flows.infer(throw, prior, num_simulations=SIMULATIONS, steps=STEPS, polish=0, progress_bar=True)
draws = posterior.sample((1000,), x=torch.tensor([1.5, 1.6]))
low, high = draws.quantile(0.05, dim=0), draws.quantile(0.95, dim=0)
for name, start, end in zip(("speed", "angle"), low, high, strict=True):
    print(f"{name}: 90 % between {float(start):.2f} and {float(end):.2f}")
