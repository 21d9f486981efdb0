"""How data differ from those of a run, by its fingerprint, and which points the run was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.conditions import Conditions
from flows.datasets.base import Dataset
from flows.datasets.recognition.fingerprint import SPLITS, column_digests, joined_hashes, label_digest
from flows.datasets.recognition.hashing import digest, hash_rows
from flows.datasets.recognition.rounded_rows import Found, RoundedRows
from flows.datasets.tables.diagnosis import listed
from flows.errors import FlowsError, InvalidValueError

TOLERANCE = 1e-4  # of the spread of drawn points; other machines round otherwise
FEW = 0.5  # of the training rows were found, so that one looks further
ALL = 0.98  # of the rows
SHAPES = {"context_shape": "shape of contexts", "num_classes": "number of classes", "num_levels": "number of levels"}


@dataclass(frozen=True)
class _Names:
    """Names of the columns in a run and now."""

    old: list[str]
    new: list[str]

    @property
    def old_are_positions(self) -> bool:
        return self.old == [str(i) for i in range(len(self.old))]

    @property
    def new_are_positions(self) -> bool:
        return self.new == [str(i) for i in range(len(self.new))]


@dataclass(frozen=True)
class Comparison:
    """How data differ from those of a run.

    Attributes:
        differences: what differs, in words; empty if data and split are the same.
        unequal: what else would keep a run from going on bit for bit, such as another order of the rows.
        columns: positions of the columns in the order of the run, if they come in another order.
        hashes: hashes of the rows of each split; empty for data that are drawn afresh.
        trained: hashes of training rows of the run, rising.
        share: of the distinct training rows of the run whose hashes are in `trained`.
        rounding: the difference that only concerns the rounding of the values, if rows and split are the same.
        rounded: finds rows that were rounded or have a changed column; None if the rows are the same.
        columns_of_run: names of the columns.
        doubt: what keeps rows from being recognised, in words.
        about_columns: those of the differences that concern columns, shapes and conditions, not rows and split.
        same_rows: whether the rows are those of the run, perhaps rounded, whatever the split.
    """

    differences: Sequence[str] = ()
    unequal: Sequence[str] = ()
    columns: Sequence[int] | None = None
    hashes: Mapping[str, NDArray[np.uint64]] = field(default_factory=dict)
    trained: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    share: float = 1.0
    rounding: str | None = None
    rounded: RoundedRows | None = None
    columns_of_run: Sequence[str] = ()
    doubt: str = ""
    about_columns: Sequence[str] = ()
    same_rows: bool = False
    partial: bool = False  # whether only some of the training rows were hashed

    @property
    def text(self) -> str:
        """All differences as one phrase."""
        return "; ".join(self.differences)

    def trained_on(self, part: str) -> tuple[int, int]:
        """Return how many points of a part are training points of the run, and how many points it has.

        Points that were rounded count, and those that are equal but for one column. The number is estimated from a
        sample if there are very many points.
        """
        exact, total = self._exactly(part)
        found = self.found_otherwise(part)
        return exact if found is None else found.count, total

    def found_otherwise(self, part: str) -> Found | None:
        """Return the training points that were rounded or have a changed column, or None if there are none."""
        return None if self.rounded is None else self.rounded.trained_on(part, self._exactly(part)[0])

    def _exactly(self, part: str) -> tuple[int, int]:
        found = self.hashes.get(part, np.empty(0, np.uint64))
        if self.share < 1 and len(self.trained):
            sampled = found[found <= self.trained[-1]]  # the smallest hashes are a random sample
            known = float(np.isin(sampled, self.trained).mean()) if len(sampled) else 0.0
            return round(known * len(found)), len(found)
        return int(np.isin(found, self.trained).sum()), len(found)

    def known_to_be_trained_on(self, part: str) -> NDArray[np.float64]:
        """Return 1 for each point of a part that is exactly a training point of the run, 0 for others.

        NaN for a point of which that is not known, since a run keeps at most 65,536 hashes.
        """
        found = self.hashes.get(part, np.empty(0, np.uint64))
        known = np.isin(found, self.trained).astype(np.float64)
        if self.share < 1 and len(self.trained):
            known[found > self.trained[-1]] = np.nan
        if self.partial:
            known[known == 0] = np.nan
        return known

    def trained_on_in_words(self, part: str) -> str:
        """Say it, such as "12 of 100 test points are training points of the run"."""
        count, total = self.trained_on(part)
        found = self.found_otherwise(part)
        about = "about " if (self.share < 1 and count) or (found is not None and found.about) else ""
        about = "at least " if self.partial else about
        are = "is a training point" if total == 1 else "are training points"
        how = "" if found is None else " up to rounding"
        if found is not None and found.left_out:
            are = "equals a training point" if total == 1 else "equal training points"
            most = "at most " if len(found.left_out) > 1 else ""
            how = f" in all columns but {most}{listed(repr(self.columns_of_run[i]) for i in found.left_out)}"
        doubt = f" ({self.doubt})" if self.doubt and found is None else ""
        return f"{about}{count:,} of {total:,} {part} points {are} of the run{how}{doubt}"


def compare(stored: Mapping[str, Any] | None, dataset: Dataset) -> Comparison:
    """Compare data with what a checkpoint says about those of its run.

    Args:
        stored: the entry `data` of a checkpoint. Without a fingerprint in it, only the shape is compared.
        dataset: the data.
    """
    try:
        return _compared(stored or {}, dataset)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, FlowsError):
            raise
        raise InvalidValueError(
            f"the fingerprint of the data in the checkpoint is damaged ({type(error).__name__}: {error}); use another "
            "checkpoint of the run"
        ) from error


def _compared(stored: Mapping[str, Any], dataset: Dataset) -> Comparison:
    if not isinstance(dataset, Dataset):
        return Comparison()  # data of the user's own, which only have a name
    names = _Names(list(stored.get("columns") or []), list(getattr(dataset, "columns", None) or []))
    shape = [None if given is None else list(given) for given in (stored.get("event_shape"), dataset.event_shape)]
    if shape[0] is not None and shape[1] is not None and shape[0] != shape[1]:
        text = _about_shape(shape[0], shape[1], names)
        return Comparison([text], about_columns=[text])
    differences = []
    for key, what in SHAPES.items():
        now = getattr(dataset, key, None)
        now = list(now) if isinstance(now, tuple) else now
        if key == "context_shape" and now and getattr(dataset, "input_columns", None) and stored.get(key):
            now = [*stored[key][:1], *now[1:]]  # inputs may have any number of samples
        if key in stored and now != stored[key]:
            differences.append(f"the {what} is {_shown(now)}, {_shown(stored[key])} in the run")
    differences += _about_conditions(stored.get("conditions"), getattr(dataset, "conditions", None))
    old = stored.get("fingerprint")
    if old is None and "fingerprint" not in stored:
        return Comparison(differences, about_columns=differences)
    if not isinstance(old, Mapping):
        raise TypeError(f"it is {type(old).__name__}, no mapping")
    new = dataset.fingerprint()
    if new["kind"] != old.get("kind"):
        differences.append("they are of another kind")
        return Comparison(differences, about_columns=differences)
    found = KINDS[new["kind"]](old, new, dataset, names)
    about_columns = [*differences, *found.about_columns]
    return replace(found, differences=[*differences, *found.differences], about_columns=about_columns)


def _about_conditions(stored: Mapping[str, Any] | None, now: Conditions | None) -> list[str]:
    before = Conditions.from_dict(stored)
    if before is None or now is None or before == now:
        return []
    if before.columns != now.columns:
        return [f"the conditions are {listed(map(repr, now.columns))}, {listed(map(repr, before.columns))} in the run"]
    changed = [name for name in now.columns if before.categories.get(name) != now.categories.get(name)]
    return [f"the condition {listed(map(repr, changed))} has other categories than in the run"]


def _compare_rows(old: Mapping[str, Any], new: Mapping[str, Any], dataset: Dataset, names: _Names) -> Comparison:
    rows, labels = dataset.rows_for_hashing(), dataset.labels_for_hashing()
    units, differences = old["units"], []
    order, columns = _match_columns(old, new, names, differences)
    about_columns = list(differences)
    hashes = {split: hash_rows(rows[split], units, order) for split in SPLITS}
    if old.get("label_units") is not None and labels is not None:
        if any(labels[split].shape[1] != len(old["label_units"]) for split in SPLITS):
            return Comparison(differences)  # other columns, as the difference of shapes says
        hashes, labels = joined_hashes(hashes, labels, old["label_units"]), None
    every = np.concatenate([hashes[split] for split in SPLITS])
    trained = old["trained"].numpy().view(np.uint64)
    fixed = old["fixed"] and new["fixed"]
    parts = SPLITS if fixed else SPLITS[1:]
    same_parts = all(digest(hashes[split]) == old["parts"][split] for split in parts)
    same_rows = same_parts or (fixed and digest(every) == old["digest"])
    split = [{k: v for k, v in found["settings"].items() if k != "smallest"} for found in (old, new)]
    settings = _about_settings(*split)
    rounded, rounding, doubt = None, None, ""
    if not same_rows:
        if old.get("rounded") is not None:
            rounded = RoundedRows(old["rounded"], old["rows"], {split: rows[split] for split in SPLITS}, order)
        if rounded is not None and labels is None and rounded.only_rounding:
            rounding = f"the values are rounded otherwise, as in float32 or with six digits ({len(every):,} rows)"
            differences.append(rounding)
        else:
            digests = None if units is None else column_digests(rows, units, order)
            text, doubt = _about_rows(every, trained, old, digests, names.old, rounded)
            differences.append(text)
    aligned = same_parts or rounding is not None
    if not aligned:
        known = "split_seed" in old["settings"] and "split_seed" in new["settings"]
        cause = ", as the rows come in another order" if known else ""
        differences += settings or [f"the split is another one{cause}"] * same_rows
    elif labels is not None and old["labels"] not in (None, label_digest(hashes, labels)):
        differences.append(dataset.label_differences)
    noise = _about_settings({"noise": old["settings"].get("noise")}, {"noise": new["settings"].get("noise")})
    differences += noise if aligned else []
    unequal = [text for text in settings if aligned and text not in noise]
    if same_parts and any(digest(hashes[split], in_order=True) != old["order"][split] for split in parts):
        unequal.append("the same rows come in another order")
    share = len(trained) / max(1, old["trained_distinct"])
    everywhere = rounding is not None or same_rows
    if not everywhere and rounded is not None and len(every) == sum(old["rows"].values()):
        everywhere = rounded.share >= ALL
    return Comparison(
        differences=differences,
        unequal=unequal,
        columns=columns,
        hashes=hashes,
        trained=trained,
        share=share,
        rounding=rounding,
        rounded=rounded,
        columns_of_run=names.old or [],
        doubt=doubt,
        about_columns=about_columns,
        same_rows=everywhere,
        partial=old["settings"].get("rows", 0) > sum(old["rows"].values()),
    )


def _match_columns(
    old: Mapping[str, Any], new: Mapping[str, Any], names: _Names, differences: list[str]
) -> tuple[list[int] | None, list[int] | None]:
    """Return the columns in the order of the run: to hash them, and to put right; None for the order that they have."""
    if old["columns"] is None or new["columns"] is None or not names.old:
        return None, None
    by_name = None
    if names.old != names.new and sorted(names.old) == sorted(names.new):
        by_name = [names.new.index(name) for name in names.old]
    stored, found = list(old["columns"]), list(new["columns"])
    if [found[i] for i in by_name or range(len(found))] == stored:
        if by_name is None and names.old != names.new and not (names.old_are_positions or names.new_are_positions):
            pairs = zip(names.old, names.new, strict=True)
            differences.append(f"columns were renamed: {listed(f'{a!r} is now {b!r}' for a, b in pairs if a != b)}")
        return by_name, by_name
    if sorted(stored) != sorted(found) or len(set(stored)) < len(stored):
        return by_name, by_name
    moved = [found.index(column) for column in stored]
    pairs = [(names.new[j], names.old[i]) for i, j in enumerate(moved) if names.new[j] != names.old[i]]
    if names.new_are_positions or names.old_are_positions:
        return moved, moved
    where = listed(f"{a!r} holds what was {b!r}" for a, b in pairs)
    differences.append(f"the values of columns were exchanged or their names were: {where}")
    return moved, None


def _compare_draws(old: Mapping[str, Any], new: Mapping[str, Any], dataset: Dataset, names: _Names) -> Comparison:
    differences = _about_settings(old["settings"], new["settings"])
    probes = [probe.double().numpy() for probe in (old["probe"], new["probe"]) if probe is not None]
    if not differences and old["dtype"] == new["dtype"] and len(probes) == 2:
        a, b = probes
        spread = float(np.std(a)) or 1.0
        if a.shape != b.shape or not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * spread, equal_nan=True):
            differences.append(f"{dataset.name} is another density than in the run")
    return Comparison(differences, _about_settings(old["sizes"], new["sizes"]))


def _compare_unknown(old: Mapping[str, Any], new: Mapping[str, Any], dataset: Dataset, names: _Names) -> Comparison:
    return Comparison()


KINDS = {"rows": _compare_rows, "draws": _compare_draws, "unknown": _compare_unknown}


def _about_shape(old: list[int], new: list[int], names: _Names) -> str:
    added = [name for name in names.new if name not in names.old]
    missing = [name for name in names.old if name not in names.new]
    if not names.old or not names.new or not (added or missing):
        return f"their points have the shape {tuple(new)}, those of the run {tuple(old)}"
    parts = [f"{listed(map(repr, added))} added"] * bool(added) + [f"{listed(map(repr, missing))} missing"] * bool(
        missing
    )
    cure = "" if missing else f"; set columns=[{','.join(names.old)}]"
    return f"they have {new[0]} columns, those of the run {old[0]} ({', '.join(parts)}){cure}"


def _about_rows(
    every: NDArray[np.uint64],
    trained: NDArray[np.uint64],
    old: Mapping[str, Any],
    digests: list[str] | None,
    names: Sequence[str],
    rounded: RoundedRows | None,
) -> tuple[str, str]:
    """Return what differs in the rows, and what keeps them from being recognised."""
    before, now = sum(old["rows"].values()), len(every)
    counts = f"{now:,} rows, {before:,} in the run" if now != before else f"{now:,} rows, as in the run"
    known = float(np.isin(trained, every).mean()) if len(trained) else 0.0
    if known == 1 and now != before:
        what = "row was" if abs(now - before) == 1 else "rows were"
        return f"{abs(now - before):,} {what} {'added' if now > before else 'removed'} ({counts})", ""
    changed = []
    if digests is not None and now == before:
        changed = [name for name, a, b in zip(names, old["columns"], digests, strict=True) if a != b]
    if len(changed) == len(names):
        changed = []
    doubt = ""
    if rounded is not None and known < FEW:
        share = rounded.share
        if share >= FEW:
            part = "the rows" if share >= ALL else f"about {share:.0%} of the rows"
            order = ", in another order or split" if share >= ALL and now == before else ""
            return f"{part} are those of the run up to rounding{order} ({counts})", ""
        found = rounded.trained_on("train", 0)
        if found is not None and len(found.left_out) == 1 and not changed:
            changed = [names[i] for i in found.left_out]
        if changed:
            doubt = f"{listed(map(repr, changed))} cannot be compared, and the other columns do not tell rows apart"
        elif not rounded.comparable:
            doubt = "exactly; rows that were rounded cannot be recognised here, as so many are close to each other"
        elif not rounded.comparable_without:
            doubt = "rows of which a column was changed cannot be recognised here, as the others do not tell rows apart"
    where = f" in the column{'s' if len(changed) > 1 else ''} {listed(map(repr, changed))}" if changed else ""
    if known == 0 and not where:
        return f"these are other rows, no training row of the run is among them ({counts})", doubt
    missing = round((1 - known) * old["trained_distinct"])
    about = "about " if len(trained) < old["trained_distinct"] else ""
    text = (
        f"{'values changed' + where if where else 'rows or values changed'}: {about}{missing:,} of "
        f"{old['trained_distinct']:,} training rows of the run are missing ({counts})"
    )
    return text, doubt


def _about_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_shown(new.get(name))}, {_shown(old.get(name))} in the run"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
