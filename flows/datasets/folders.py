"""Which files of a folder are pictures or tables, and which split and class each one belongs to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.errors import DataWarning, InvalidValueError, warn

PICTURES = frozenset(
    [
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg"),
        *(".jpx", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    ]
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
BEGINS_WITH_SPLIT = re.compile(rf"({'|'.join(SPLIT_OF)})([^a-z]|$)", re.IGNORECASE)
MAX_NAMED = 5  # in a message
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # beside all names that begin with a dot


@dataclass(frozen=True)
class Found:
    """Files by split, with their class if they have one."""

    files: Mapping[str, list[Path]]
    labels: Mapping[str, Sequence[str | None]]


def find_pictures(folder: Path) -> Found | None:
    """Find all pictures below a folder, or return None if there are none.

    Folders decide, names of files do not: sub-folders "train", "validation" and "test" are splits if no other
    folder stands beside them, or if there are at least two of them. Sub-folders of a split are classes. A
    `DataWarning` counts the files that are not used.
    """
    every, strange, empty = _files(folder)
    pictures = [file for file in every if file.suffix.lower() in PICTURES]
    if not pictures:
        return None
    others = [file for file in every if file.suffix.lower() not in PICTURES]
    tables = sum(file.suffix.lower() == ".parquet" for file in others)
    if tables:
        raise InvalidValueError(
            f"{folder} holds {len(pictures):,} pictures and {tables:,} Parquet files; move one kind elsewhere, or give "
            "the path of the folder or file that holds the images"
        )
    places = {file: file.relative_to(folder).parts[:-1] for file in pictures}
    unused: list[tuple[int, str]] = []
    level = _split_level(list(places.values()))
    splits = dict.fromkeys(pictures, "train")
    if level is not None:
        splits = {file: _split_at(place, level) for file, place in places.items() if _split_at(place, level)}
        rest = Counter("/".join(place[: level + 1]) or "." for file, place in places.items() if file not in splits)
        unused += [(count, f"in {name}, which is no split") for name, count in sorted(rest.items())]
        places = {file: (*places[file][:level], *places[file][level + 1 :]) for file in splits}
    labels = {file: place[0] if place else None for file, place in places.items()}
    files = {split: [file for file in places if splits[file] == split] for split in SPLITS}
    files = {split: found for split, found in files.items() if found}
    by_split: dict[str, list[str | None]] = {
        split: _classes([labels[file] for file in found]) for split, found in files.items()
    }
    if level is None and len(set(labels.values())) < 2:
        by_split = {split: [None] * len(found) for split, found in files.items()}  # one folder is no class
    unused += [(1, f"no regular file ({file.name})") for file in strange[:MAX_NAMED]]
    if len(strange) > MAX_NAMED:
        unused.append((len(strange) - MAX_NAMED, "no regular files"))
    kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
    unused += [(count, f"no pictures ({kind})") for kind, count in sorted(kinds.items())]
    _tell(folder, "pictures", len(every) + len(strange), len(places), unused, empty if any(labels.values()) else ())
    _tell_names(folder, level, files)
    return Found(files, by_split)


def find_tables(folder: Path) -> Found | None:
    """Find all Parquet files below a folder, or return None if there are none.

    A file belongs to the split whose word begins its name or is the name of a folder around it.
    """
    every, _, _ = _files(folder)
    tables = [file for file in every if file.suffix.lower() == ".parquet"]
    if not tables:
        return None
    named = {file: _split_of_table(file.relative_to(folder)) for file in tables}
    known = {split for split in named.values() if split}
    unused: list[tuple[int, str]] = []
    if "train" in known and (None not in named.values() or len(known) > 1):
        found = {split: [file for file in tables if named[file] == split] for split in SPLITS if split in known}
        rest = [file.name for file in tables if named[file] is None]
        unused += [(len(rest), f"of no split, such as {rest[0]}")] if rest else []
    elif len(known) == 1 and None not in named.values():
        found = {known.pop(): tables}
    else:
        found = {"train": tables}
    _tell(folder, "Parquet files", len(tables), sum(map(len, found.values())), unused)
    return Found(found, {})


def every_file(folder: Path) -> list[Path]:
    """Return all regular files below a folder but hidden ones."""
    return _files(folder)[0]


def split_of_name(name: str) -> str | None:
    """Return the split whose word begins a name, or None."""
    start = BEGINS_WITH_SPLIT.match(name)
    return SPLIT_OF[start[1].lower()] if start else None


def tell_unused(folder: Path, found: int, others: Sequence[Path]) -> None:
    """Warn of files that hold no images."""
    kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
    unused = [(count, f"no images ({kind})") for kind, count in sorted(kinds.items())]
    _tell(folder, "files of images", found, found - len(others), unused)


def _files(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Find all files below a folder, through links too; hidden ones are skipped.

    Returns:
        Regular files, others such as pipes and broken links, and empty folders.
    """
    seen: set[str] = set()
    files, strange, empty = [], [], []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        here = [Path(place, name) for name in names if not _hidden(name)]
        files += [file for file in here if file.is_file()]
        strange += [file for file in here if not file.is_file()]
        if not here and not folders:
            empty.append(str(Path(place).relative_to(folder)))
    return sorted(files), sorted(strange), empty


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _split_level(places: Sequence[tuple[str, ...]]) -> int | None:
    """Return the level of folders that are splits, or None."""
    for level in (0, 1):
        names = {place[level] if len(place) > level else "" for place in places}
        splits = {SPLIT_OF[name.lower()] for name in names if name.lower() in SPLIT_OF}
        others = any(name.lower() not in SPLIT_OF for name in names)
        if splits and (not others or (level == 0 and "train" in splits and len(splits) > 1)):
            return level
    return None


def _split_at(place: tuple[str, ...], level: int) -> str:
    return SPLIT_OF.get(place[level].lower(), "") if len(place) > level else ""


def _classes(labels: list[str | None]) -> list[str | None]:
    """Return the labels if every picture of the split has one."""
    return [None] * len(labels) if None in labels else labels


def _split_of_table(place: Path) -> str | None:
    words = [part.lower() for part in place.parts[:-1]]
    folder = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)
    return folder or split_of_name(place.stem)


def _tell(
    folder: Path, what: str, found: int, used: int, unused: Sequence[tuple[int, str]], empty: Sequence[str] = ()
) -> None:
    if empty:
        named = ", ".join(empty[:MAX_NAMED])
        warn(f"{folder}: empty folders are no classes: {named}", DataWarning)
    if unused:
        reasons = ", ".join(f"{count:,} {reason}" for count, reason in unused)
        warn(f"{folder}: {found:,} files found, {used:,} {what} used; not used: {reasons}", DataWarning)


def _tell_names(folder: Path, level: int | None, files: Mapping[str, Sequence[Path]]) -> None:
    """Warn if names of files speak of splits, which only folders make."""
    if level is not None:
        return
    names = [BEGINS_WITH_SPLIT.match(file.stem) for file in files["train"]]
    words = Counter(SPLIT_OF[name[1].lower()] for name in names if name)
    if len(words) > 1:
        counts = ", ".join(f"{count:,} {word!r}" for word, count in sorted(words.items()))
        warn(
            f"{folder}: names of files begin with splits ({counts}), but only folders make splits, so all pictures are "
            "split at random; move them to sub-folders train, validation and test",
            DataWarning,
        )
