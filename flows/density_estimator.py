"""A flow as an estimator of scikit-learn: the density of a table in three lines."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases import Base
from flows.checks import check_number, whole_number
from flows.datasets import Table
from flows.datasets.tables.contexts import as_columns
from flows.datasets.tables.diagnosis import warnings_about
from flows.density_recipe import CONDITIONAL_TABLE, TABLE, FitEvaluator, Recipe, untrained_flow, widths
from flows.divergence import Auto, DivergenceEstimator
from flows.errors import DataWarning, FlowsError, InvalidTypeError, InvalidValueError, warn
from flows.models.cnf import CNF
from flows.solvers import ODESolver, as_solver
from flows.training import Optimization, Reporting, Trainer

MIN_ROWS = 5
BATCH = 10_000  # rows in one solve
STEPS_OF_SCORES = (10, 20, 40, 80, 160)  # of Runge-Kutta, to choose from
ACCURACY = 1e-4  # nats, of log p by a row in the mean
CHECKED_ROWS = 256  # by which the number of steps is chosen
SOURCE = "X"  # what messages call the table


@checked(own="all")
class DensityEstimator(DensityMixin, BaseEstimator):
    """The density p(x) of the rows of a table, or p(x | context), with the interface of scikit-learn.

    ```python
    import numpy as np

    import flows

    X = np.random.default_rng(0).normal(size=(300, 2))
    model = flows.DensityEstimator(steps=50, polish=0).fit(X)  # the default takes half a minute
    log_p = model.score_samples(X)  # (300,), nats
    ```

    Columns are standardised, and log p is in the units of the data. Some rows are set apart: training stops early when
    they get no more likely, and the best weights are kept. Defaults are those of `experiment=table` from the shell, and
    with a context those of `experiment=conditional_table`.

    A flow is trained by flow matching and then for a few steps by its likelihood. Scores are computed with fixed steps
    in float64, so the score of a row does not depend on the other rows.

    Args:
        steps: of flow matching. Default: 3000, with a context 2000.
        polish: steps of maximum likelihood after it; 0: none. Default: 50, with a context 400.
        hidden: widths of the layers of the network. Default: (64, 64), with a context (32, 32).
        field: another field: a module, or what makes one from `event_shape` and `context_shape`, such as a class of
            `flows.fields`. Default: an `MLP` with `hidden`.
        base: where the flow starts, a base or a name such as `"student_t"` for heavy tails. Default: N(0, I).
        divergence: an estimator or its name, for training. Scores take an exact one where that is affordable.
        solver: for scores and samples, an `ODESolver` or the name of a method. Default: as many steps of Runge-Kutta as
            they need for 1e-4 nats.
        batch_size: rows in one step. Default: 256, with a context 512 for flow matching.
        learning_rate: the highest of both stages. Default: 2e-3, without a context 1e-3 for the likelihood.
        weight_decay: of AdamW. Default: 0.01, with a context 0.1.
        validation_fraction: share of the rows that training is stopped by.
        patience: stop flow matching after so many steps without a better validation. `None`: never.
        dequantise_columns: columns of rounded values to which noise of one unit is added, by name or position, or
            `"auto"`; see `flows.datasets.Table`.
        categories: names of context columns whose numbers are categories.
        progress_bar: show one.
        output_dir: folder for checkpoints, metrics and pictures of the run. `None`: nothing is kept.
        random_state: seed of all that is random in `fit`.

    Attributes:
        flow_: the trained `flows.CNF`.
        n_features_in_: number of columns.
        feature_names_in_: names of the columns, if `X` had any; samples then are data frames.
        conditions_: names and categories of the columns of the context, or `None`.
        validation_score_: mean log p of the rows that were set apart, of the weights that were kept.
        n_steps_: steps taken, over both stages.

    Raises:
        ValueError, TypeError: from `fit`: the data or an argument cannot be used; the message says why.
    """

    feature_names_in_: NDArray[Any]
    n_features_in_: int

    def __init__(
        self,
        steps: int | None = None,
        polish: int | None = None,
        hidden: Sequence[int] | None = None,
        *,
        field: nn.Module | Callable[..., nn.Module] | None = None,
        base: Base | str | None = None,
        divergence: DivergenceEstimator | str | None = None,
        solver: ODESolver | str | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        validation_fraction: float = 0.15,
        patience: int | None = 1000,
        dequantise_columns: Literal["auto"] | Sequence[str | int] | None = None,
        categories: Sequence[str] = (),
        progress_bar: bool = False,
        output_dir: str | os.PathLike[str] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.steps = steps
        self.polish = polish
        self.hidden = hidden
        self.field = field
        self.base = base
        self.divergence = divergence
        self.solver = solver
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.dequantise_columns = dequantise_columns
        self.categories = categories
        self.progress_bar = progress_bar
        self.output_dir = output_dir
        self.random_state = random_state

    @checked(own="all")
    def fit(self, X: ArrayLike, y: Any = None, context: Any = None) -> DensityEstimator:
        """Train a flow on the rows of a table.

        Args:
            X: numbers (rows, columns): an array or a data frame.
            y: not used, as scikit-learn has it.
            context: what the density is conditional on, a row for each of `X`: a data frame of numbers and words, a
                mapping from names to columns, or numbers (rows, columns).

        Raises:
            InvalidValueError: there are NaN, infinite or constant columns, too few rows, or no row of the context for
                each of `X`.
        """
        is_frame = type(X).__module__.partition(".")[0] == "pandas"
        rows = self._table(X, reset=True)
        seed = int(check_random_state(self.random_state).randint(2**31))
        data = self._dataset(rows, context, seed)
        with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            folder = self.output_dir
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
            trainer = self._trainer(data, seed, folder)
            summary = trainer.fit()
        self.flow_: CNF = trainer.model.eval()  # type: ignore[assignment]
        self.flow_.requires_grad_(False)
        self.conditions_ = data.conditions
        score = summary.validation_score
        self.validation_score_ = math.nan if score is None else -score
        self.n_steps_ = summary.position.step
        self._is_frame_ = is_frame
        held_out = data.held_out("validation")
        self.flow_.solver = self._solver_of_scores(held_out.x, held_out.context)
        return self

    @checked(own="all")
    def score_samples(
        self, X: ArrayLike, context: Any = None, return_error: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """log p of each row in nats.

        Args:
            X: numbers (rows, columns).
            context: one for each row, or a single one for all.
            return_error: also return the error of each value: that of the solver by a much tighter solve, and the
                standard error of an estimator that is not exact.

        Returns:
            log p (rows,), or log p and its error.
        """
        check_is_fitted(self)
        x = torch.from_numpy(self._table(X, reset=False))
        contexts = self._contexts(context, len(x))
        flow, values, errors = self._exact_flow(), [], []
        for start in range(0, len(x), BATCH):
            part = slice(start, start + BATCH)
            generator = torch.Generator(flow.device).manual_seed(0)
            given = None if contexts is None else contexts[part].to(flow.device)
            found = flow.estimate_log_prob(x[part].to(flow.device), given, generator, solver_error=return_error)
            values.append(found.value.cpu())
            if found.solver_error is not None:
                errors.append(torch.hypot(found.solver_error, found.standard_error).cpu())
        log_p = torch.cat(values).double().numpy()
        return (log_p, torch.cat(errors).double().numpy()) if return_error else log_p

    @checked(own="all")
    def score(self, X: ArrayLike, y: Any = None, context: Any = None) -> float:
        """The mean of log p over the rows, in nats; larger is better.

        Args:
            X, context: see `score_samples`.
            y: not used, as scikit-learn has it.
        """
        return float(np.mean(self.score_samples(X, context)))

    @checked(own="all")
    def sample(
        self,
        n_samples: int = 1,
        context: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> Any:
        """Draw rows.

        Args:
            n_samples: rows to draw, for each context if there are several.
            context: one or several; the rows of several follow each other.
            random_state: seed.

        Returns:
            An array (rows, columns), or a data frame if the estimator was fitted on one. The index of the data frame
            holds the context of each row where there are several; `reset_index()` makes columns of them.
        """
        check_is_fitted(self)
        number = whole_number("n_samples", n_samples)
        seed = int(check_random_state(random_state).randint(2**31))
        generator = torch.Generator(self.flow_.device).manual_seed(seed)
        given = self._contexts(context, None)
        given_ndim = 0 if given is None else given.ndim
        if given is not None:
            given = given.reshape(-1, given.shape[-1]).repeat_interleave(number, 0)
        total, parts = number if given is None else len(given), []
        for start in range(0, total, BATCH):
            size = min(BATCH, total - start)
            if given is None:
                parts.append(self.flow_.sample(size, generator=generator))
            else:
                part = given[start : start + size].to(self.flow_.device)
                parts.append(self.flow_.sample((), part, generator))
        rows = torch.cat(parts).double().cpu().numpy()
        if not self._is_frame_:
            return rows
        import pandas

        index = None
        if given is not None and given_ndim > 1 and self.conditions_ is not None:
            index = pandas.MultiIndex.from_frame(pandas.DataFrame(self.conditions_.decode(given)))
        return pandas.DataFrame(rows, index=index, columns=getattr(self, "feature_names_in_", None))

    def fitted_flow(self) -> CNF:
        """The flow, once there is one.

        Raises:
            NotFittedError: there is none.
        """
        check_is_fitted(self)
        return self.flow_

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes beside the flow."""
        names = getattr(self, "feature_names_in_", None)
        plain = (bool, int, float, str, type(None))
        parameters = {name: _bare(value) for name, value in self.get_params(deep=False).items()}
        parameters = {
            name: value
            for name, value in parameters.items()
            if name != "output_dir"  # a place on this machine
            and (isinstance(value, plain) or (isinstance(value, list) and all(isinstance(v, plain) for v in value)))
        }
        return {
            "parameters": parameters,
            "feature_names_in_": None if names is None else list(names),
            "validation_score_": self.validation_score_,
            "n_steps_": self.n_steps_,
            "is_frame": self._is_frame_,
        }

    @classmethod
    def from_dict(cls, stored: Any, flow: CNF) -> DensityEstimator:
        """A fitted estimator from what `as_dict` returned, and its flow.

        Raises:
            InvalidValueError: `stored` is something else.
        """
        try:
            parameters: dict[str, Any] = dict(stored["parameters"])
            parameters.pop("output_dir", None)  # of a file that came from anywhere
            given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in parameters.items()}
            model = cls(**given)
            names = stored["feature_names_in_"]
            if names is not None:
                model.feature_names_in_ = np.array(list(map(str, names)), dtype=object)
            model.validation_score_ = float(stored["validation_score_"])
            model.n_steps_ = int(stored["n_steps_"])
            model._is_frame_ = bool(stored["is_frame"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidValueError(f"the settings of a DensityEstimator are damaged: {error}") from error
        (model.n_features_in_,) = flow.event_shape
        model.flow_ = flow.requires_grad_(False)
        model.conditions_ = None if flow.encoder is None else flow.encoder.conditions
        return model

    def _table(self, X: ArrayLike, reset: bool) -> NDArray[np.float64]:
        """The rows as float64, checked as scikit-learn does it.

        Raises:
            InvalidTypeError, InvalidValueError: in the words of scikit-learn.
        """
        try:
            least = MIN_ROWS if reset else 1
            rows: Any = X
            found: Any = validate_data(self, rows, reset=reset, dtype=np.float64, ensure_min_samples=least, copy=True)
            return found
        except FlowsError:
            raise
        except (ValueError, TypeError) as error:
            kind = InvalidTypeError if isinstance(error, TypeError) else InvalidValueError
            raise kind(f"{error}{_about_words(X)}") from error

    def _dataset(self, rows: NDArray[np.float64], context: Any, seed: int) -> Table:
        """The rows as a data set. A copy of the first one is its test part, which nobody looks at."""
        names = [str(name) for name in getattr(self, "feature_names_in_", range(rows.shape[1]))]
        constant = [name for name, column in zip(names, rows.T, strict=True) if np.ptp(column) == 0]
        if constant:
            raise InvalidValueError(
                f"{SOURCE}: column {', '.join(map(repr, constant))} holds the same value in all rows, so it has no "
                "density; leave it out"
            )
        check_number("validation_fraction", self.validation_fraction, above=0, below=1)
        given = None
        if context is not None:
            given = as_columns(context, SOURCE)
            if not hasattr(self, "feature_names_in_") and set(names) & set(given):
                names = [f"x{i}" for i in range(len(names))]
            wrong = next((name for name, column in given.items() if len(column) != len(rows)), None)
            if wrong is not None:
                raise InvalidValueError(
                    f"context must have one row for each of X: its column {wrong!r} has {len(given[wrong])} entries, "
                    f"and X has {len(rows)} rows"
                )
            given = {name: [*column, next(iter(column))] for name, column in given.items()}
        table = Table(
            np.concatenate([rows, rows[:1]]),
            names,
            validation_fraction=max(float(self.validation_fraction), 1 / len(rows)),
            split_seed=seed,
            source=SOURCE,
            dequantise_columns=self.dequantise_columns,
            quiet=True,
            context=given,
            categories=tuple(self.categories),
            test_rows=[len(rows)],
        )
        parts = {"train": np.arange(len(rows)), "validation": np.arange(0), "test": np.arange(0)}
        for message in warnings_about(rows, parts, names, (table.units == 0).tolist(), SOURCE):
            warn(message, DataWarning)
        return table

    def _trainer(self, data: Table, seed: int, folder: str | os.PathLike[str]) -> Trainer:
        """The run that `fit` is."""
        recipe = self._recipe(data)
        check_number("weight_decay", recipe.weight_decay, at_least=0)
        decay = functools.partial(torch.optim.AdamW, weight_decay=recipe.weight_decay)
        every = max(1, min(recipe.validate_every, recipe.steps // 3))
        reporting = Reporting(
            progress_bar=bool(self.progress_bar),
            plot_every=None if self.output_dir is None else 0,
            validate_every=every,
            checkpoint_every=0,
        )
        return Trainer(
            untrained_flow(data, recipe.hidden, self.field, self.base, self.divergence),
            data,
            recipe.stages(self.patience),
            evaluator=FitEvaluator(data, solver_error_points=0, seed=seed, progress_bar=False),
            optimization=Optimization(optimizer=decay, ema_decay=0.99),
            reporting=reporting,
            output_dir=folder,
            seed=seed,
        )

    def _recipe(self, data: Table) -> Recipe:
        """The settings that were asked for, and those of the recipe for all others."""
        recipe = TABLE if data.context_shape is None else CONDITIONAL_TABLE
        given: dict[str, Any] = {
            "steps": None if self.steps is None else whole_number("steps", self.steps),
            "polish": None if self.polish is None else whole_number("polish", self.polish, 0),
            "hidden": None if self.hidden is None else widths(self.hidden),
            "batch_sizes": None if self.batch_size is None else (self.batch_size, self.batch_size),
            "learning_rates": None if self.learning_rate is None else (self.learning_rate, self.learning_rate),
            "weight_decay": self.weight_decay,
        }
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})

    def _exact_flow(self) -> CNF:
        """The flow in float64, with the divergence of scores."""
        flow = copy.deepcopy(self.flow_)
        if flow.device.type != "mps":  # which has no float64
            flow = flow.double()
        cheapest = Auto()
        if cheapest.bind(flow.bind()).is_exact:
            flow.divergence = cheapest
        return flow

    def _solver_of_scores(self, x: Tensor, context: Tensor | None) -> ODESolver:
        """The solver that was asked for, or the fewest steps that are accurate on these rows."""
        if self.solver is not None:
            return as_solver(self.solver)
        flow = self._exact_flow()
        x = x[:CHECKED_ROWS].to(flow.device)
        context = None if context is None else context[:CHECKED_ROWS].to(flow.device)
        before = None
        for steps in STEPS_OF_SCORES:
            flow.solver = ODESolver("rk4", step_size=1 / steps)
            value = flow.log_prob(x, context, torch.Generator(flow.device).manual_seed(0))
            if before is not None and float((value - before).abs().mean()) < ACCURACY:
                break
            before = value
        return flow.solver

    def _contexts(self, context: Any, rows: int | None) -> Tensor | None:
        """Contexts in data units, one for each row if there are rows."""
        if (context is None) != (self.conditions_ is None):
            raise InvalidValueError(
                "the estimator was fitted with a context, and needs one: context=..."
                if context is None
                else "the estimator was fitted without a context, and takes none"
            )
        if context is None or self.conditions_ is None:
            return None
        if not isinstance(context, Mapping) and not hasattr(context, "columns"):
            array = np.asarray(context)
            if array.dtype.kind in "fiub":
                context = array[:, None] if array.ndim == 1 and self.conditions_.shape == (1,) else array
            elif array.ndim in (1, 2) and array.dtype.kind in "OUS" and "c0" in self.conditions_.columns:
                context = as_columns(context, "scores")  # as `fit` reads them
        found = self.conditions_.encode(context)
        if rows is None:
            return found
        if found.ndim > 1 and len(found) not in (1, rows):
            raise InvalidValueError(
                f"context must have one row for each of X, {rows}, or a single one, got {len(found)}"
            )
        return found.expand(rows, found.shape[-1])


def _about_words(X: Any) -> str:
    """What to do about columns of a data frame that hold no numbers."""
    kinds = getattr(X, "dtypes", None)
    if not hasattr(kinds, "items"):
        return ""
    words = [repr(str(name)) for name, kind in kinds.items() if getattr(kind, "kind", "O") not in "biuf"]  # type: ignore[union-attr]
    return f"; column {', '.join(words)} holds no numbers: leave it out, or pass it as context=..." if words else ""


def _bare(value: Any) -> Any:
    """Numbers and lists in place of those of NumPy."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return [_bare(part) for part in value] if isinstance(value, list | tuple) else value
