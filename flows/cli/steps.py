"""The steps of a whole run, shared among its stages."""

from __future__ import annotations

from typing import Any

from flows.errors import InvalidValueError


def share_steps(config: dict[str, Any]) -> None:
    """Give the stages the number of steps that `steps` asks for, in the proportions of their own.

    Warm-ups become shorter or longer with them.

    Raises:
        InvalidValueError: a stage ends by time, or there are fewer steps than stages.
    """
    total = config.pop("steps", None)
    stages = config.get("objective")
    if total is None or not isinstance(stages, dict):
        return
    given = {name: stage.get("steps") if isinstance(stage, dict) else None for name, stage in stages.items()}
    before = {name: steps for name, steps in given.items() if isinstance(steps, int) and steps > 0}
    if uncounted := [f"objective.{name}" for name in given if name not in before]:
        raise InvalidValueError(
            f"steps={total} is shared among stages that count steps, and {', '.join(uncounted)} does not; set steps or "
            "seconds of each stage"
        )
    if total < len(before):
        names = ", ".join(before)
        raise InvalidValueError(f"steps must be >= {len(before)}, one a stage ({names}), got {total}")
    left, weight = total, sum(before.values())
    for place, (name, old) in enumerate(before.items()):
        later = len(before) - place - 1
        new = left if later == 0 else min(max(1, round(left * old / weight)), left - later)
        left, weight = left - new, weight - old
        stages[name] = {**stages[name], "steps": new}
        if isinstance(warmup := stages[name].get("warmup_steps"), int):
            stages[name]["warmup_steps"] = warmup * new // old
