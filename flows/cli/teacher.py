"""Training that learns from a run: `flows train teacher=RUN objective=reflow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.cli.arguments import refuse
from flows.errors import InvalidValueError
from flows.training.building import PARTS
from flows.training.checkpoint import CheckpointError, find_checkpoint
from flows.training.loading import checkpoint_config, load_content
from flows.training.model_file import is_model_file
from flows.training.settings import TARGET, parameter_names

OF_THE_RUN = ("data", "model", *PARTS, "evaluation")


def with_teacher(config: Mapping[str, Any], overrides: Sequence[str], trust: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a run that learns from that in `config["teacher"]`: its data and model, and the stages that do.

    Stages that train without a teacher are left out. An objective with a solver of its own keeps it for the model, and
    the evaluation that goes with it.

    Raises:
        InvalidValueError: no stage has a teacher, or the command line changes what is the teacher's.
        CheckpointError: there is no such run.
    """
    config = dict(config)
    teacher = config.pop("teacher", None)
    if teacher is None:
        return config
    learns = {name: stage for name, stage in config["objective"].items() if _takes(stage, "teacher")}
    if not learns:
        raise InvalidValueError(
            f"teacher={teacher} needs an objective that learns from it: objective=reflow or objective=distillation; to "
            "go on with the run itself, write resume="
        )
    file = find_checkpoint(teacher)
    if is_model_file(file):
        raise CheckpointError(
            f"{file} holds a model alone, and a teacher is a run, whose data are learned from as well: give its "
            "folder, or train in Python, with Reflow(teacher=flows.load(path)) from flows.objectives"
        )
    known = checkpoint_config(load_content(file), file, trust)
    own = {"solver", "evaluation"} if any(_takes(stage, "solver") for stage in learns.values()) else set()
    taken = [part for part in OF_THE_RUN if part not in own]
    refuse(overrides, dict.fromkeys(taken, "the model and the data are those of the teacher; leave it out"))
    for part in taken:
        config.pop(part, None)
        if part in known:
            config[part] = known[part]
    found = str(file.resolve())  # a resumed run may start in another folder
    config["objective"] = {
        name: {**stage, "objective": {**stage["objective"], "teacher": found}} for name, stage in learns.items()
    }
    return config


def _takes(stage: Any, name: str) -> bool:
    objective = stage.get("objective") if isinstance(stage, Mapping) else None
    return isinstance(objective, Mapping) and name in parameter_names(objective.get(TARGET))
