"""Save trained models, load them, and share them on the Hugging Face Hub."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import flows
from flows.arguments import checked
from flows.errors import FileError, FlowsError, InvalidTypeError, MissingPackageError
from flows.inference import Posterior
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.training.building import build_model
from flows.training.checkpoint import MODEL_FILE, CheckpointError
from flows.training.described import (
    Description,
    UndescribedError,
    describe_data,
    describe_model,
    describe_part,
    dtype_name,
    with_tensors,
)
from flows.training.fitting import dtype_named, load_weights
from flows.training.loading import load_flow, load_run
from flows.training.model_file import write_model
from flows.training.settings import TARGET, instantiate
from flows.writing import write_text

if TYPE_CHECKING:
    from flows.density_estimator import DensityEstimator

CARD = "README.md"
CARD_TEXT = """---
library_name: flows
tags:
- continuous-normalizing-flow
---

# {repo}

{kind} over points of shape {shape}{context}, with {parameters:,} parameters.

```python
import flows

model = flows.from_hub("{repo}")
```
"""


@checked
def save(
    model: CNF | NeuralODE | Posterior | DensityEstimator,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    weights_only: bool = False,
) -> Path:
    """Save a model: its tensors, and what builds it again.

    The file is one of safetensors, with the settings among its metadata; loading it runs no code. All that belongs to
    the model is in it: the standardisation, the names of columns and classes, and the encoder of contexts.

    Args:
        model: a flow, a neural ODE, a posterior, or a fitted `flows.DensityEstimator`.
        path: the file; for a folder that exists, `model.safetensors` in it.
        settings: of parts whose classes are not derived from those of this package, by name: import path and arguments,
            such as `{"field": {"_target_": "my_package.Net", "width": 64}}`.
        weights_only: leave out what builds the model; `flows.load(path, flow=flow)` then fills a flow.

    Returns:
        The path of the file.

    Raises:
        UndescribedError: nothing tells how to build a part; the message says what to write.
        FileError: the file cannot be written.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP(2, hidden=(16,)))
        flows.save(flow, "moons.flow")
        flow = flows.load("moons.flow")
        ```
    """
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    inner = _inner(model)
    state, extra = inner.state_dict(), {}
    if weights_only:
        description = Description(None, describe_data(inner), dtype_name(inner))
        return write_model(path, state, description, {}, flows.__version__)
    description = describe_model(inner, settings)
    _check_rebuilds(description, state)
    if isinstance(model, Posterior):
        prior = None if model.prior is None else model.prior.distribution
        describe_part(description, "posterior", {"prior": prior, "x": model.x})
    elif model is not inner:
        extra["density_estimator"] = model.as_dict()  # type: ignore[union-attr]
    return write_model(path, state, description, extra, flows.__version__)


@checked
def load(
    path: str | os.PathLike[str],
    trust: Sequence[str] = (),
    flow: CNF | NeuralODE | None = None,
) -> Any:
    """Load a trained model from a file, or from the folder of a run.

    It has its averaged weights, is in evaluation mode and lies on the CPU. The file is read as data, and its settings
    may name classes of this package alone.

    Args:
        path: a file of `flows.save`, or its folder; the folder of a run, for its best weights; or a checkpoint.
        trust: names of packages whose classes the settings may name, besides this package's.
        flow: a model of the same shape to fill, where the file has no settings.

    Returns:
        What was saved: a `flows.CNF`, `flows.NeuralODE`, `flows.Posterior` or `flows.DensityEstimator`. A run gives its
        model.

    Raises:
        CheckpointError: the file is missing, damaged, or belongs to another model.
        UntrustedConfigError: the settings name something else.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP(2, hidden=(16,)))
        path = flows.save(flow, "moons.flow")
        x = flows.load(path).sample(10)
        ```
    """
    if flow is not None:
        return load_flow(path, trust, flow)
    run = load_run(path, trust)
    if "density_estimator" in run.extra:
        try:
            return flows.DensityEstimator.from_dict(run.extra["density_estimator"], run.flow)
        except FlowsError as error:
            raise CheckpointError(f"no DensityEstimator can be built from {run.checkpoint}: {error}") from error
    if "posterior" in run.config:
        return _posterior(run.flow, run.config["posterior"], run.checkpoint)
    return run.model


@checked
def to_hub(
    model: CNF | NeuralODE | Posterior | DensityEstimator,
    repo: str,
    private: bool = False,
    settings: Mapping[str, Any] | None = None,
    token: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub: the file of `flows.save`, and a card.

    Needs the package huggingface_hub, and a login: `hf auth login`.

    Args:
        model, settings: see `flows.save`.
        repo: such as "me/moons"; it is made if needed. An existing card is left alone.
        private: whether a new repository is private.
        token: of the Hub. Default: that of the login.

    Returns:
        The address of the upload.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        FileError: the Hub refuses.
    """
    hub, inner = _hub(), _inner(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder, settings)
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            if not api.file_exists(repo, CARD):
                write_text(folder / CARD, _card(model, inner, repo))
            found = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload a model")
        except (OSError, ValueError) as error:
            raise FileError(f"the model cannot be uploaded to {repo!r}: {_first_line(error)}") from error
    return str(found)


@checked
def from_hub(
    repo: str,
    trust: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """Download a model from the Hugging Face Hub and load it; see `flows.load`.

    Needs the package huggingface_hub.

    Args:
        repo: such as "me/moons".
        trust: see `flows.load`.
        revision: a branch, tag or commit. Default: the newest.
        token: of the Hub, for private repositories. Default: that of the login.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        FileError: there is no such repository, or no model in it.
        CheckpointError: see `flows.load`.
    """
    hub = _hub()
    try:
        path = hub.hf_hub_download(repo, MODEL_FILE, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{MODEL_FILE} cannot be downloaded from {repo!r}: {_first_line(error)}; name a repository such as "
            "'me/moons' to which flows.to_hub has uploaded a model"
        ) from error
    return load(path, trust)


def _inner(model: Any) -> CNF | NeuralODE:
    """The flow or the neural ODE inside."""
    if isinstance(model, CNF | NeuralODE):
        return model
    if isinstance(model, Posterior):
        return model.flow
    estimators: Any = sys.modules.get("flows.density_estimator")
    if estimators is not None and isinstance(model, estimators.DensityEstimator):
        return model.fitted_flow()
    raise InvalidTypeError(
        "a model to save must be a flows.CNF, flows.NeuralODE, flows.Posterior or flows.DensityEstimator, got an "
        f"object of class {type(model).__name__}; for another module save its state_dict()"
    )


def _check_rebuilds(description: Description, state: Mapping[str, Any]) -> None:
    """Require that the description builds a model that these weights fit.

    Raises:
        UndescribedError: it does not.
    """
    data, dtype = description.data, dtype_named(description.dtype)
    shape, points = data["context_shape"], state.get("base.points")
    given = {**state, **description.arguments}
    try:
        with torch.random.fork_rng(devices=()):  # weights are drawn, to be replaced
            config = with_tensors(description.settings, given)
            known = {"num_levels": data["num_levels"], "num_points": None if points is None else len(points)}
            conditions = flows.conditions.Conditions.from_dict(data.get("conditions"))
            model = build_model(config, data["event_shape"], None, dtype, shape, conditions=conditions, **known)
        load_weights(model, {name: _on_cpu(value) for name, value in state.items()}, also=dtype)
    except FlowsError as error:
        raise UndescribedError(
            f"the arguments of its constructors do not build this model again: {error}. If it was changed after that, "
            "save weights_only=True, and load into a flow that you have built, flow=..."
        ) from error


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _posterior(flow: CNF, settings: Any, path: Path) -> Posterior:
    prior, x = (settings.get(name) if isinstance(settings, Mapping) else None for name in ("prior", "x"))
    try:
        if isinstance(prior, Mapping) and TARGET in prior:
            prior = instantiate(prior, "posterior.prior")
        return Posterior(flow, prior, x)
    except FlowsError as error:
        raise CheckpointError(f"no posterior can be built from the settings in {path}: {error}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError(
            "sharing on the Hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _card(model: Any, inner: CNF | NeuralODE, repo: str) -> str:
    context = f" under contexts of shape {inner.context_shape}" if getattr(inner, "context_shape", None) else ""
    parameters = sum(math.prod(parameter.shape) for parameter in inner.parameters())
    kind = f"A `flows.{type(model).__name__}`"
    return CARD_TEXT.format(
        repo=repo, kind=kind, shape=tuple(inner.event_shape), context=context, parameters=parameters
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
