"""What TensorBoard shows of a run beside its curves: what was chosen, and which curves belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.naming import in_words
from flows.objectives import FlowMatching
from flows.training.loggers import Layout
from flows.training.settings import TARGET, complete
from flows.training.stage import DEFAULTS
from flows.training.state import Run

UNTOLD = ("output_dir", "resume", "trust", "reporting", "hardware", "evaluation")  # parts that do not tell runs apart
USUAL = {"model": "cnf", "base": "normal", "transform": "standardise", "optimizer": "adam"}  # names that go unsaid
SIZES = ("data.num_validation", "data.num_test")  # of what a run is judged on
METHOD = "method"  # of a solver: its name


def chosen_settings(run: Run) -> dict[str, Any]:
    """The choices of a run under short names, for a row of TensorBoard's HPARAMS tab.

    Each part has the name of its class, `field: mlp`. Of its settings, those come that are not the class's default,
    and those that a sweep varies (`Run.labels`).
    """
    shown: dict[str, Any] = {}
    for part, config in (run.config or {}).items():
        if part == "objective" and isinstance(config, Mapping):
            shown[part] = " + ".join(config)
            for stage, settings in config.items():
                own = _differing(stage, settings)
                shown |= {name.replace(f"{stage}.objective.", f"{stage}."): value for name, value in own.items()}
        elif part not in UNTOLD:
            name = _name(config)
            if name not in (None, part, USUAL.get(part)):
                shown[part] = config.get(METHOD) or name
            shown |= _differing(part, config)
    if not run.config:
        shown |= _of_model(run)
    known = {
        name: value for name, value in shown.items() if value is not None and not _is_recommended(name, value, run)
    }
    known = {name: value for name, value in known.items() if not _is_recommended(name, value, run)}
    names = sorted(known, key=lambda name: "." in name)  # the names of parts first: few columns are shown at once
    return {**run.labels, **{name: known[name] for name in names if name not in run.labels}}


def _is_recommended(name: str, value: Any, run: Run) -> bool:
    """Whether a setting of a stage is what its objective recommends."""
    stage, _, key = name.rpartition(".")
    if stage not in run.stages or key not in DEFAULTS:
        return False
    usual = {**DEFAULTS, **getattr(run.stages[stage].objective, "recommended", {})}
    steps = run.stages[stage].steps
    most = usual["warmup_steps"] if steps is None else min(usual["warmup_steps"], steps // 10)
    return value == {**usual, "warmup_steps": most}[key]


def _differing(part: str, config: Any) -> dict[str, Any]:
    """Settings that are not the default of their class, with the names of parts inside."""
    if not isinstance(config, Mapping):
        return {part: config}
    target, shown = config.get(TARGET), {}
    usual = {} if target is None else complete({part: {TARGET: target}})[part]
    for key, value in config.items():
        name, before = f"{part}.{key}", usual.get(key)
        if key in (TARGET, "_partial_", METHOD if target is not None else None):
            continue
        if isinstance(value, Mapping):
            kind = _name(value)
            if kind is not None and value.get("weight", 1) == 0:
                continue  # a path cost that is not taken
            if kind is not None and kind not in (_name(before), part):
                shown[name] = kind
            shown |= _differing(name, value)
        elif key not in usual or before != value:
            shown[name] = value
    return shown


def _name(config: Any) -> str | None:
    """The name of the class that settings name: `flows.fields.MLP` is mlp."""
    target = config.get(TARGET) if isinstance(config, Mapping) else None
    return None if target is None else in_words(str(target).rpartition(".")[2])


def _of_model(run: Run) -> dict[str, Any]:
    """The parts of the model of a run that was started from Python without settings."""
    model, shown = run.model, {"objective": " + ".join(run.stages)}
    for part in ("field", "divergence", "base", "transform"):
        found = getattr(model, part, None)
        if found is not None:
            shown[part] = in_words(type(found).__name__)
    solver = getattr(model, "solver", None)
    if solver is not None:
        shown["solver"] = solver.method
    return shown


def layout(run: Run) -> Layout:
    """The curves that belong together: the quality, each stage, and the cost."""
    stages, dataset = run.stages, run.dataset
    quality = {"score (lower is better)": ["validation/score"]}
    if getattr(dataset, "has_samples", False):
        quality = {"negative log-likelihood in nats": ["validation/nll", "test/nll"]}
        quality["standard error in nats"] = ["validation/nll_se", "test/nll_se"]
    if getattr(dataset, "entropy", None) is not None:
        quality["gap to the entropy in nats"] = ["validation/gap", "test/gap"]
    if getattr(dataset, "num_levels", None) is not None:
        quality["bits per dimension"] = ["validation/bits_per_dim", "test/bits_per_dim"]
    charts: dict[str, dict[str, list[str]]] = {"quality": quality}
    for name, stage in stages.items():
        charts[name] = {"loss": [f"{name}/loss", f"{name}/nll"]}
        if isinstance(stage.objective, FlowMatching):
            errors = ("velocity_error", "divergence_error")
            charts[name]["square errors of flow matching"] = [f"{name}/{error}" for error in errors]
        charts[name]["gradient norm"] = [f"{name}/gradient_norm"]
        charts[name]["learning rate"] = [f"{name}/learning_rate"]
    nfe = [f"{stage}/nfe_{way}" for stage in stages for way in ("forward", "backward")]
    charts["cost"] = {
        "evaluations of the field": [*nfe, "validation/nfe"],
        "steps per second": [f"{stage}/steps_per_second" for stage in stages],
        "steps of a solve": [f"{stage}/steps_{kind}" for stage in stages for kind in ("accepted", "rejected")],
    }
    return Layout(charts)
