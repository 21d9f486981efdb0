"""Simulations of any Python function: prior → parameters → observation."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, check_seed, whole_number
from flows.datasets.batches import Batch
from flows.datasets.simulators.priors import Prior
from flows.datasets.simulators.simulations import Simulations, as_pairs
from flows.errors import ComputationError, DataWarning, FlowsError, InvalidTypeError, InvalidValueError, warn

AT_ONCE = 1_000  # parameters in one call of a vectorised simulator


@checked
class Simulator(Simulations):
    """Draws parameters from a prior and simulates an observation for each.

    Seeds torch, NumPy and `random` around the simulations, so that equal settings give equal data.

    Args:
        simulate: any function of parameters (d,), or of a batch of them (n, d), that returns an observation or a batch
            of them: a tensor, an array or numbers. It gets tensors, or arrays if it is written in NumPy.
        prior: of the parameters, see `flows.datasets.Prior`.
        num_simulations: for training and validation together.
        num_test: further ones, for the test alone.
        validation_fraction: of `num_simulations`.
        vectorised: whether `simulate` takes a batch, with parameters and noise of its own for each row; "auto": find
            out by a few calls.
        invalid: "raise" where a simulation holds NaN or infinite values; or "drop" them, which are then counted in
            `num_dropped` and told. The posterior is then the one given that a simulation is valid.
        seed: of all random numbers.
        name: name of the runs.

    Attributes:
        num_dropped: simulations that were left out.

    Raises:
        InvalidTypeError, InvalidValueError: prior and simulator do not fit, or a simulation is invalid; the message
            names its parameters.
        ComputationError: the simulator fails.

    Example:
        ```python
        import torch

        import flows

        def simulate(theta):  # (d,) -> (2,)
            return theta + 0.1 * torch.randn(2)

        prior = flows.datasets.box([-1, -1], [1, 1])
        data = flows.datasets.Simulator(simulate, prior, num_simulations=200, num_test=10)
        ```
    """

    def __init__(
        self,
        simulate: Callable[[Tensor], Any],
        prior: Any,
        num_simulations: int = 10_000,
        num_test: int = 1_000,
        validation_fraction: float = 0.05,
        vectorised: bool | Literal["auto"] = "auto",
        invalid: Literal["raise", "drop"] = "raise",
        seed: int = 0,
        name: str = "simulator",
    ) -> None:
        if not callable(simulate):
            raise InvalidTypeError(f"simulate must be a function of parameters, got {simulate!r}")
        self.simulate = simulate
        self._call = simulate
        self.num_simulations = whole_number("num_simulations", num_simulations, 4)
        whole_number("num_test", num_test, 1)
        check_number("validation_fraction", validation_fraction, above=0, below=1)
        check_seed(seed)
        self.num_dropped = 0
        known = Prior(prior)
        with seeded(seed):
            self._call = _taking_tensors(simulate, known)
        with seeded(seed):
            self._vectorised = _takes_batches(self._call, known) if vectorised == "auto" else bool(vectorised)
            if self._vectorised and _shares_noise(self._call, known.sample(1)[0]):
                raise InvalidValueError(
                    "the simulator draws some of its random numbers once a batch, so that simulations share their "
                    "noise; draw them for each row, such as torch.randn_like(theta), or set vectorised=False"
                )
        with seeded(seed):
            counts = {"train": self.num_simulations, "test": num_test}
            drawn = {part: self._valid(known.sample(count), invalid) for part, count in counts.items()}
        if self.num_dropped:
            warn(
                f"{self.num_dropped} of {sum(counts.values())} simulations hold NaN or infinite values and were left "
                "out (invalid=drop); the posterior is the one given that a simulation is valid",
                DataWarning,
            )
        pairs = drawn["train"]
        middle = len(pairs) - max(1, round(len(pairs) * validation_fraction))
        parts = {"train": pairs[:middle], "validation": pairs[middle:], "test": drawn["test"]}
        settings = {"validation_fraction": float(validation_fraction), "seed": seed, "num_simulations": num_simulations}
        self._hold(parts, known, name, settings)

    def run(self, theta: Tensor) -> Tensor:  # (n, d) -> (n, *observation)
        """Simulate an observation for each row of parameters.

        Raises:
            ComputationError: the simulator fails.
            InvalidValueError: it returns another shape than before, or no numbers.
        """
        if not self._vectorised:
            rows = [_called(self._call, row, f"the parameters {row.tolist()}") for row in theta]
            for row, found in zip(theta, rows, strict=True):
                if found.shape != rows[0].shape:
                    raise InvalidValueError(
                        f"the simulator must return observations of one shape: it returned {tuple(rows[0].shape)} for "
                        f"the parameters {theta[0].tolist()} and {tuple(found.shape)} for {row.tolist()}"
                    )
            return torch.stack(rows)
        found = []
        for part in theta.split(AT_ONCE):
            given = f"a batch of {len(part)} rows of parameters, the first {part[0].tolist()}"
            one = _called(self._call, part, given)
            if one.ndim == 0 or len(one) != len(part) or (found and one.shape[1:] != found[0].shape[1:]):
                expected = ("n", *found[0].shape[1:]) if found else ("n", "*observation")
                raise InvalidValueError(
                    f"the simulator must return one observation a row, of shape ({', '.join(map(str, expected))}), got "
                    f"{tuple(one.shape)} for {given}; if it takes a single row, set vectorised=False"
                )
            found.append(one)
        return torch.cat(found)

    def _valid(self, theta: Tensor, invalid: str) -> Batch:
        observations = self.run(theta)
        valid = observations.reshape(len(theta), -1).isfinite().all(1)
        lost = int((~valid).sum())
        if lost and invalid == "raise":
            first = int((~valid).nonzero()[0])
            raise InvalidValueError(
                f"{lost} of {len(theta)} simulations hold NaN or infinite values, the first for the parameters "
                f"{theta[first].tolist()}; set invalid=drop to leave such simulations out and count them"
            )
        if lost == len(theta):
            raise InvalidValueError(f"all of {lost} simulations hold NaN or infinite values, so none is left")
        self.num_dropped += lost
        return as_pairs(theta[valid], observations[valid])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of torch, NumPy and Python, and put their states back afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _taking_tensors(simulate: Callable[[Tensor], Any], prior: Prior) -> Callable[[Tensor], Any]:
    """The simulator, which gets arrays if NumPy cannot do with tensors what it does."""
    theta = prior.sample(prior.event_shape[0] + 2)
    for given in (theta[0], theta):  # a simulator may be made for one of them
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                simulate(given.clone())
                failed = False
            except Exception:  # a simulator may raise anything
                failed = True
        if not failed and not any("__array" in str(warning.message) for warning in told):
            return simulate
        of_arrays = functools.partial(_with_array, simulate)
        if _tried(of_arrays, given) is not None:
            return of_arrays
    return simulate


def _with_array(simulate: Callable[[Any], Any], theta: Tensor) -> Any:
    return simulate(theta.numpy())


def _takes_batches(simulate: Callable[[Tensor], Any], prior: Prior) -> bool:
    """Whether a batch of parameters gives each row an observation of its own, of the shape that a single row gives."""
    theta = prior.sample(prior.event_shape[0] + 2)  # a number that no row of parameters has
    batch, single = _tried(simulate, theta), _tried(simulate, theta[0])
    if batch is None or batch.ndim == 0 or len(batch) != len(theta):
        return False
    if single is None or single.shape == (1, *batch.shape[1:]):
        return True
    own = single.shape == batch.shape[1:]
    return own and not _mixes_rows(simulate, theta, prior) and not _shares_noise(simulate, theta[0])


def _mixes_rows(simulate: Callable[[Tensor], Any], theta: Tensor, prior: Prior) -> bool:
    """Whether the first observation depends on other rows of parameters, as in `theta / theta.norm()`."""
    found = []
    for batch in (theta, torch.cat([theta[:1], prior.sample(len(theta) - 1)])):
        with seeded(0):
            found.append(_tried(simulate, batch))
    one, other = found
    return one is None or other is None or not bool(torch.isclose(one[0], other[0], equal_nan=True).all())


def _shares_noise(simulate: Callable[[Tensor], Any], row: Tensor) -> bool:
    """Whether a number varies from call to call, but not among equal rows of a call, as in `theta + torch.randn(d)`."""
    equal = row.expand(len(row) + 16, -1)  # so many fair coins hardly ever fall alike
    one, other = (_tried(simulate, equal.clone()) for _ in range(2))
    if one is None or other is None or one.shape != other.shape or one.ndim == 0 or len(one) != len(equal):
        return False
    alike = (one == one[:1]).all(0) & (other == other[:1]).all(0)
    return bool((alike & (one[0] != other[0])).any())


def _tried(simulate: Callable[[Tensor], Any], theta: Tensor) -> Tensor | None:
    """What the simulator returns; None where it fails, as it may not be made for such a call."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return _as_numbers(simulate(theta))
    return None


def _called(simulate: Callable[[Tensor], Any], theta: Tensor, given: str) -> Tensor:
    try:
        found = simulate(theta)
    except FlowsError:
        raise
    except Exception as error:  # a simulator may raise anything
        raise ComputationError(f"the simulator fails for {given}: {type(error).__name__}: {error}") from error
    try:
        return _as_numbers(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(
            f"the simulator must return real numbers, a tensor or an array, got {type(found).__name__} for {given}"
        ) from error


def _as_numbers(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        array = np.asarray(found)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"no numbers: {array.dtype}")
        found = torch.from_numpy(np.array(array))
    found = found.detach().cpu()
    if found.is_complex():
        raise TypeError("complex numbers")
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())
