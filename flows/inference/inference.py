"""From a simulator and a prior to a posterior, in one call."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_seed, whole_number
from flows.datasets import Simulations, Simulator
from flows.datasets.simulators.priors import Prior
from flows.encoders import Embedding
from flows.errors import InvalidValueError
from flows.evaluation import PosteriorEvaluator
from flows.fields import MLP
from flows.inference.posterior import Posterior
from flows.models.cnf import CNF
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.training import Reporting, Stage, Trainer
from flows.transforms import Compose, Standardise, Unbounded

STEPS, POLISH = 5_000, 50  # of flow matching, and of the likelihood


@checked
def posterior_flow(data: Simulations) -> CNF:
    """An untrained flow for simulations: bounded by the prior, with an embedding of observations.

    Its transform and its encoder are fitted to the training part.

    Example:
        ```python
        import torch

        import flows
        from flows.inference import posterior_flow

        flow = posterior_flow(flows.datasets.TwoMoons(num_simulations=200, num_test=10))
        flow.sample((10,), context=torch.zeros(2))  # parameters within the prior
        ```
    """
    transform = Compose(
        unbounded=Unbounded(data.event_shape, data.bounds),
        standardise=Standardise(data.event_shape),
    ).fit(data.reference())
    assert data.context_shape is not None  # that of the observations
    encoder = Embedding(data.context_shape).fit(data.reference_contexts())
    field = MLP(data.event_shape, activation="silu", context_shape=encoder.features_shape)
    return CNF(field, transform=transform, encoder=encoder)


@checked(own=("prior",))
def infer(
    simulate: Callable[[Tensor], Any],
    prior: Any,
    num_simulations: int = 10_000,
    steps: int = STEPS,
    polish: int = POLISH,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
    **simulator: Any,
) -> Posterior:
    """Simulate, train a flow, and return the posterior of the parameters.

    Flow matching of the posterior, then a few steps of its likelihood.

    Args:
        simulate: any function of parameters, see `flows.datasets.Simulator`.
        prior: any distribution with `sample` and `log_prob`.
        num_simulations: for training and validation together.
        steps: of flow matching.
        polish: steps of maximum likelihood; 0: none.
        seed: of all random numbers.
        output_dir: folder of the run; None: nothing is kept.
        progress_bar: show one.
        simulator: further settings of `flows.datasets.Simulator`, such as `invalid="drop"`.

    Raises:
        FlowsError: simulator and prior do not fit, a simulation is invalid, or training fails.

    Example:
        ```python
        import torch

        import flows

        def simulate(theta):
            return theta + 0.1 * torch.randn(2)

        prior = flows.datasets.box([-1, -1], [1, 1])
        posterior = flows.infer(simulate, prior, num_simulations=200, steps=20, polish=0)  # take thousands of steps
        theta = posterior.sample((100,), x=torch.zeros(2))
        ```
    """
    settings = {"num_test": 100, "seed": seed, **simulator}  # a short test, as its figures go into the folder alone
    data = Simulator(simulate, prior, num_simulations, **settings)
    return _trained(data, steps, polish, seed, output_dir, progress_bar)


@checked(own=("prior",))
class Inference:
    """Inference in the steps of `sbi`: append simulations, train, build the posterior.

    ```python
    import torch

    import flows

    prior = flows.datasets.box([0.0], [1.0])
    theta = prior.sample((200,))
    inference = flows.inference.Inference(prior)
    inference.append_simulations(theta, theta + 0.1 * torch.randn(200, 1)).train(steps=20, polish=0)
    posterior = inference.build_posterior().set_default_x(torch.tensor([0.5]))
    ```

    Args:
        prior: any distribution with `sample` and `log_prob`, such as those of `sbi`.
        seed: of all random numbers.
    """

    def __init__(self, prior: Any, seed: int = 0) -> None:
        check_seed(seed)
        self.prior = Prior(prior)
        self.seed = seed
        self._theta: list[Tensor] = []
        self._observations: list[Tensor] = []
        self._posterior: Posterior | None = None

    @checked
    def append_simulations(self, theta: Tensor, x: Tensor) -> Inference:
        """Add parameters (n, d), drawn from the prior, and their observations (n, *observation)."""
        if theta.ndim == 0 or x.ndim == 0 or len(theta) != len(x):
            raise InvalidValueError(
                f"each row of parameters needs its observation, got theta of shape {tuple(theta.shape)} and x of shape "
                f"{tuple(x.shape)}"
            )
        for name, new, old in (("theta", theta, self._theta), ("x", x, self._observations)):
            if old and new.shape[1:] != old[0].shape[1:]:
                raise InvalidValueError(
                    f"{name} must have rows of the shape {tuple(old[0].shape[1:])}, as before, got {tuple(new.shape)}"
                )
        self._theta.append(theta)
        self._observations.append(x)
        return self

    @checked
    def train(
        self,
        steps: int = STEPS,
        polish: int = POLISH,
        output_dir: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
    ) -> CNF:
        """Train a flow on all simulations; see `infer`."""
        if not self._theta:
            raise InvalidValueError("there are no simulations: call append_simulations(theta, x) before train()")
        data = Simulations(torch.cat(self._theta), torch.cat(self._observations), self.prior)
        self._posterior = _trained(data, steps, polish, self.seed, output_dir, progress_bar)
        return self._posterior.flow

    @checked
    def build_posterior(self, flow: CNF | None = None) -> Posterior:
        """Return the posterior of a flow that `train()` has returned; by default the last one."""
        if flow is not None:
            return Posterior(flow, self.prior)
        if self._posterior is None:
            raise InvalidValueError("nothing is trained yet: call train() before build_posterior()")
        return self._posterior


def _trained(
    data: Simulations,
    steps: int,
    polish: int,
    seed: int,
    output_dir: str | os.PathLike[str] | None,
    progress_bar: bool,
) -> Posterior:
    stages = {"flow_matching": Stage(FlowMatching(target="sampled"), whole_number("steps", steps))}
    if whole_number("polish", polish, 0):
        stages["maximum_likelihood"] = Stage(MaximumLikelihood(), polish, learning_rate=5e-4, warmup_steps=polish // 4)
    reporting = Reporting(progress_bar=progress_bar, plot_every=None)
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = posterior_flow(data)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run" if output_dir is None else output_dir
        evaluator = PosteriorEvaluator(data, seed=seed, progress_bar=progress_bar, calibration_points=0)
        Trainer(flow, data, stages, evaluator=evaluator, reporting=reporting, output_dir=folder, seed=seed).fit()
    return Posterior(flow, data.prior)
