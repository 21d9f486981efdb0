"""In which steps of a run the divergence estimator took part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flows.divergence import Auto
from flows.models.cnf import CNF
from flows.objectives import Objective
from flows.training.stage import Stage
from flows.training.state import Position


def stages_with_estimator(model: nn.Module, stages: Mapping[str, Stage]) -> list[str] | None:
    """The stages whose objective takes the divergence by the flow's estimator; None where that cannot be told."""
    objectives = {name: stage.objective for name, stage in stages.items()}
    if not isinstance(model, CNF) or not all(isinstance(one, Objective) for one in objectives.values()):
        return None
    chosen: dict[str, Any] = objectives
    return [name for name, objective in chosen.items() if objective.divergence(model) is model.divergence]


def notice(model: nn.Module, stages: Mapping[str, Stage]) -> str | None:
    """Say so, before a run, if a chosen estimator plays no part in what is trained; None if it does."""
    taking = stages_with_estimator(model, stages)
    if taking is None or taking or not isinstance(model, CNF) or isinstance(model.divergence, Auto):
        return None
    name = type(model.divergence).__name__
    return (
        f"the divergence {name} plays no part in what is trained: {' and '.join(stages)} takes none, or an exact one. "
        "objective=maximum_likelihood trains with it; what is reported uses evaluation.divergence"
    )


def in_words(model: nn.Module, stages: Mapping[str, Stage], position: Position) -> str | None:
    """Say in how many steps of a run a chosen estimator took part; None if there was no choice, or in all of them."""
    taking = stages_with_estimator(model, stages)
    if taking is None or not isinstance(model, CNF) or isinstance(model.divergence, Auto):
        return None
    count = steps(taking, stages, position)
    if count == position.step:
        return None
    return f"{type(model.divergence).__name__} in {count or 'none'} of {position.step:,} steps"


def steps(taking: list[str], stages: Mapping[str, Stage], position: Position) -> int:
    """The number of steps of these stages."""
    ends = [*position.stage_starts[1:], position.step]
    lengths = [end - start for start, end in zip(position.stage_starts, ends, strict=True)]
    return sum(length for name, length in zip(stages, lengths, strict=False) if name in taking)
