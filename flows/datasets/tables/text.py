"""Text files of numbers; errors name the file, the row, the column and the value."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from flows.datasets.tables.columns import (
    INDEX_NAME,
    MAX_EXACT,
    Columns,
    distinct_names,
    features,
    leading_index,
    warn_of_lost_digits,
)
from flows.errors import DataWarning, FileError, InvalidTypeError, InvalidValueError, warn

MISSING_WORDS = {"", "?", "na", "n/a", "nan", "null", "none"}  # in lower case
WORDS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " "}  # easier to type than the characters
DELIMITERS = {**WORDS, "\\t": "\t"}
HEADER_SAMPLE = 1000  # rows below the first line that are read to tell whether it holds names
MIN_ROWS_TO_ASK = 10  # shorter files get no warning about a first line that may hold names
YEARS = range(1800, 2201)
NUMBER = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)\s*", re.IGNORECASE | re.ASCII)
LIKE_A_NUMBER = re.compile(r"\s*[+-]?[$€£]?\.?\d")
MAX_SHOWN = 60  # characters of a value in a message
MAX_COLUMNS = 20  # in a message
MAX_FIELD = 131_072  # characters; a longer field has a quote that was left open
STARTS = {  # of files that are no text, and what to do with them
    b"\x1f\x8b": "is compressed; unpack it with gunzip",
    b"PK\x03\x04": "is compressed; unpack it with unzip",
    b"BZh": "is compressed; unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it with unzstd",
    b"PAR1": "is a Parquet file; rename it to .parquet",
    b"\x93NUMPY": "is an array of numpy; rename it to .npy",
    b"\xff\xfe": "is text in UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "is text in UTF-16; save it as UTF-8",
}
HINTS = (  # for values that are no numbers
    (r"true|false|yes|no", "write 1 and 0"),
    (r"#.*|%.*|//.*", "remove comments"),
    (
        r"[+-]?\d{1,3}(?P<mark>[,.'’ \u00a0\u202f])\d{3}(?P=mark)?.*",
        "remove thousands separators, and write a point for a decimal comma",
    ),
    (r"[+-]?\d*,\d+(e[+-]?\d+)?", "write points for decimal commas"),
    (r".*[;\t|].*", "choose the right delimiter, such as delimiter=semicolon or delimiter=tab"),
)


def read_csv(
    path: Path,
    columns: Columns = None,
    delimiter: str = ",",
    header: bool | None = None,
    missing: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Read a text file of numbers, one row a line.

    Args:
        path: the file.
        columns: see `read_table`.
        delimiter: a single character.
        header: whether the first line holds names. Default: find out. It does if one of its fields is text and the
            field below is a number, or if its fields are numbers that can only be names: positions, years, or whole
            numbers above decimals.
        missing: read empty fields and words such as NA as NaN. Default: refuse them.

    An index that pandas wrote is left out, unless `columns` asks for it.
    """
    delimiter = checked_delimiter(delimiter)
    names, below, header = names_and_header(path, delimiter, header)
    chosen = features(columns, names, leading_index(names, below), path)
    every = len(chosen) == len(names)
    start = _line_after_names(path, delimiter) if header else 0
    rows = islice(_csv_rows(path, delimiter), int(header), None)
    # With a selection of columns, loadtxt would not notice a row with a field too many.
    shifted = not every and _bad_width(rows, len(names))
    if shifted:
        raise InvalidValueError(f"cannot read {path}: {shifted}")
    selected = None if every and columns is None else chosen
    try:
        values = _load(path, start, delimiter, selected)
    except ValueError as error:
        rows = islice(_csv_rows(path, delimiter), int(header), None)
        found = _bad_value(rows, names, chosen, missing)
        if found or not missing:
            raise InvalidValueError(f"cannot read {path}: {found or error}") from error
        values = _load(path, start, delimiter, selected, _number_or_nan)
    if values.shape[1] != len(chosen):
        raise InvalidValueError(
            f"{path} has {len(names)} names in its first line, but rows of {values.shape[1]} fields"
        )
    _tell_silent_losses(path, delimiter, start, values, [names[i] for i in chosen], chosen, len(names))
    return values, distinct_names([names[i] for i in chosen], path)


def _load(
    path: Path,
    start: int,
    delimiter: str,
    columns: Sequence[int] | None,
    converter: Callable[[str], float] | None = None,
) -> np.ndarray:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return np.loadtxt(
            (line for line in islice(file, start, None) if line.strip()),
            delimiter=delimiter,
            usecols=columns,
            ndmin=2,
            comments=None,
            quotechar='"',
            converters=converter,
            encoding=None,
        )


def _number_or_nan(field: str) -> float:
    return float("nan") if field.strip().lower() in MISSING_WORDS else float(field)


def _line_after_names(path: Path, delimiter: str) -> int:
    """Return how many lines of the file the first row and blank lines above it take; names may hold line breaks."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter)
        next(row for row in reader if not _is_blank(row))
        return reader.line_num


def _tell_silent_losses(
    path: Path, delimiter: str, start: int, values: np.ndarray, names: Sequence[str], chosen: Sequence[int], width: int
) -> None:
    """Warn of blank lines that may be missing values, and of whole numbers that lose digits."""
    if width == 1:
        with open(path, newline="", encoding="utf-8-sig") as file:
            blank = [not line.strip() for line in islice(file, start, None)]
        inside = sum(blank[: len(blank) - blank[::-1].index(False)])
        if inside:
            warn(
                f"{path}: {inside:,} blank line{'s' if inside > 1 else ''} inside a single column, which may stand for "
                "missing values, were skipped; remove them to say that nothing is missing",
                DataWarning,
            )
    large = np.flatnonzero((np.abs(values) >= MAX_EXACT).any(0))
    if len(large):
        rows = islice(_csv_rows(path, delimiter), int(start > 0), None)
        lost = {i for row in rows for i in large.tolist() if _loses_digits(row[chosen[i]])}
        warn_of_lost_digits([names[i] for i in sorted(lost)], path)


def _loses_digits(field: str) -> bool:
    digits = field.strip().lstrip("+-")
    return digits.isdigit() and int(digits) >= MAX_EXACT and int(float(digits)) != int(digits)


def text_column(path: Path, column: int, delimiter: str, header: bool) -> list[str]:
    """Return a column as text; a row that is too short has an empty entry."""
    rows = islice(_csv_rows(path, delimiter), int(header), None)
    return [row[column] if column < len(row) else "" for row in rows]


def names_and_header(path: Path, delimiter: str, header: bool | None) -> tuple[list[str], list[list[str]], bool]:
    """Return the names of the columns, the first rows of numbers, and whether the first row holds the names."""
    top = _top(path, delimiter)
    names, first = _names(top, header, path)
    return names, top[int(first) :], first


def checked_delimiter(delimiter: object) -> str:
    """Return the character that a delimiter means: itself, or one with a name such as "tab".

    Raises:
        InvalidValueError: it is no single character, or one that numbers are written with.
    """
    found = DELIMITERS.get(delimiter.lower(), delimiter) if isinstance(delimiter, str) else delimiter
    if not isinstance(found, str) or len(found) != 1 or found in '\r\n"\0' or found.isalnum() or found in "+-._":
        raise InvalidValueError(
            f"delimiter must be a single character that numbers lack, or one of the words {', '.join(WORDS)}, got "
            f"{delimiter!r}"
        )
    return found


def _top(path: Path, delimiter: str) -> list[list[str]]:
    """Return the first rows of a text file; check that it is one and has that delimiter."""
    check_text(path)
    top = list(islice(_csv_rows(path, delimiter), HEADER_SAMPLE))
    if not top:
        raise InvalidValueError(f"{path} is empty; expected one row of numbers a line")
    if len(top[0]) == 1 and len(top) > 1 and len(top[-1]) > 1 and top[0][0].lstrip()[:1] in ("#", "%"):
        raise InvalidValueError(
            f"{path}: the first line is a comment, {top[0][0][:MAX_SHOWN]!r}; remove lines that begin with "
            f"{top[0][0].lstrip()[0]!r}"
        )
    marks = [mark for mark in WORDS.values() if mark != delimiter and mark in top[0][0]]
    if len(top[0]) == 1 and marks and (marks[0] != " " or len(top[0][0].split()) == len(top[-1][0].split()) > 1):
        word = next(word for word, mark in WORDS.items() if mark == marks[0])
        raise InvalidValueError(f"{path} has no {delimiter!r} in its first line but {marks[0]!r}; set delimiter={word}")
    return top


def _names(top: Sequence[Sequence[str]], header: bool | None, path: Path) -> tuple[list[str], bool]:
    """Return the names of the columns, and whether they stand in the first line."""
    if header not in (None, True, False):
        raise InvalidTypeError(f"header must be true, false or null, got {header!r}")
    first = _is_header(top[0], top[1:], path) if header is None else bool(header)
    if len(top) == 1 and any("\n" in field or "\r" in field for field in top[0]):
        raise InvalidValueError(f"{path}: the first line opens a quote that is never closed; correct it")
    if len(top) == 1 and first:
        raise InvalidValueError(f"{path} has a line of names and no row of numbers below it")
    return [field.strip() for field in top[0]] if first else [str(i) for i in range(len(top[0]))], first


def _csv_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a text file as lists of fields; blank lines are skipped."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(_text_lines(file, path), delimiter=delimiter)
        try:
            yield from (row for row in reader if not _is_blank(row))
        except csv.Error as error:
            raise InvalidValueError(
                f"cannot read {path}: line {reader.line_num}: {error}; a field of more than {MAX_FIELD:,} characters "
                "has a quote that was left open, or is no number"
            ) from error


def _text_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if "\0" in line:
            raise InvalidValueError(
                f"{path}: line {number} holds NUL characters, as text in UTF-16 and damaged files do; save it as UTF-8"
            )
        yield line


def _is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and row[0] != "" and not row[0].strip())


def check_text(path: Path) -> None:
    """Refuse files that begin like another format."""
    with open(path, "rb") as file:
        start = file.read(8)
    for mark, what in STARTS.items():
        if start.startswith(mark):
            raise FileError(f"{path} {what}")


def hint(field: str) -> str | None:
    """Return what to do about a value that is no number, where its form tells."""
    return next((hint for form, hint in HINTS if re.fullmatch(form, field.strip(), re.IGNORECASE | re.DOTALL)), None)


def _bad_width(rows: Iterable[list[str]], width: int, first: int = 1) -> str | None:
    """Describe the first row that does not have `width` fields."""
    for number, row in enumerate(rows, start=first):
        if len(row) != width:
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            cure = (hint(row[0]) if len(row) == 1 else None) or "correct it"
            return f"row {number} (the first data row is row 1) has {fields}, expected {width}; {cure}"
    return None


def _bad_value(
    rows: Iterable[list[str]], names: Sequence[str], chosen: Sequence[int], missing: bool = False
) -> str | None:
    """Describe the first row of the wrong length, or the first value that is no number and the other such columns."""
    numbered = iter(enumerate(rows, start=1))
    for number, row in numbered:
        if wrong := _bad_width([row], len(names), number):
            return wrong
        for i in chosen:
            if _is_number(row[i]):
                continue
            if row[i].strip().lower() in MISSING_WORDS:
                if missing:
                    continue
                found = f"is missing ({row[i]!r}); fill it in or remove such rows"
            else:
                shown = row[i] if len(row[i]) <= MAX_SHOWN else f"{row[i][:MAX_SHOWN]}..."
                cure = hint(row[i]) or "correct it"
                found = f"is {shown!r}, not a number; {cure}, or leave the column out with columns=[...]"
            later = itertools.chain([row], (row for _, row in numbered))
            others = _other_columns(later, names, chosen, i, missing)
            return f"row {number} (the first data row is row 1), column {names[i]!r} {found}{others}"
    return None


def _other_columns(
    rows: Iterable[list[str]], names: Sequence[str], chosen: Sequence[int], first: int, missing: bool
) -> str:
    """Say which columns but the `first` one have values that are no numbers, and which have numbers alone."""
    words, gaps = set[int](), Counter[int]()
    for row in rows:
        if len(row) != len(names):
            continue  # told once the columns are mended
        for i in chosen:
            if i in words or _is_number(row[i]):
                continue
            if row[i].strip().lower() not in MISSING_WORDS:
                words.add(i)
            elif not missing:
                gaps[i] += 1
    wrong = words | set(gaps) | {first}
    more = [f"{names[i]!r} has words" for i in chosen if i in words - {first}]
    more += [f"{names[i]!r} lacks {gaps[i]:,} values" for i in chosen if i in gaps and i not in words]
    right = [names[i] for i in chosen if i not in wrong]
    if not more or (len(more) == 1 and wrong == {first}):
        return ""
    listed = ", ".join(more[:MAX_COLUMNS]) + (", ..." if len(more) > MAX_COLUMNS else "")
    whole = f". Numbers alone: columns=[{','.join(right)}]" if 0 < len(right) <= MAX_COLUMNS else ""
    return f"; moreover {listed}{whole}"


def _is_header(first: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> bool:
    """Tell whether the first line holds names; warn where only a guess is possible."""
    if not rows:
        return any(_is_text(field) for field in first)
    if any(_is_text(a) and _is_number(b) for a, b in zip(first, rows[0], strict=False)):
        return True
    if not any(map(LIKE_A_NUMBER.match, first)) and any(map(LIKE_A_NUMBER.match, rows[0])):
        return True  # the numbers below are written in another way, which is said later
    index = len(list(_index_names(first)))  # names of an index come before numbers
    numbers = [field.strip() for field in first[index:]]
    if not numbers or not all(map(_is_number, numbers)) or len({float(field) for field in numbers}) < len(numbers):
        return False
    columns = [[row[i] for row in rows if i < len(row)] for i in range(index, len(first))]
    if not all(field.lstrip("+-").isdigit() for field in numbers):
        steps = np.diff([float(field) for field in numbers])
        even = len(numbers) >= 5 and steps[0] > 0 and bool(np.allclose(steps, steps[0], rtol=1e-6))
        return _guessed(even, first, path) if even else False
    whole = [int(field) for field in numbers]
    consecutive = all(b - a == 1 for a, b in pairwise(whole))
    position = consecutive and whole[0] in (0, 1)
    years = consecutive and all(year in YEARS for year in whole)
    if index and (position or years or len(rows) > 1):
        return True
    if len(rows) > 1 and any(column and all(map(_is_decimal, column)) for column in columns):
        return True if position or years else _guessed(True, first, path)
    inside = any(_is_number(field) and float(field) in YEARS for column in columns for field in column)
    if (position and len(whole) > 2) or (years and len(whole) > 1 and not inside):
        return _guessed(True, first, path)
    if len(whole) > 1 and consecutive and len(rows) >= MIN_ROWS_TO_ASK:
        _guessed(False, first, path)
    return False


def _index_names(fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        if not INDEX_NAME.fullmatch(field.strip()):
            return
        yield field


def _guessed(header: bool, first: Sequence[str], path: Path) -> bool:
    taken, other = ("names", "numbers") if header else ("numbers", "names")
    line = ",".join(first[:5]) + (",..." if len(first) > 5 else "")
    warn(
        f"{path}: the first line, {line}, was taken for {taken}; if it holds {other}, set "
        f"header={str(not header).lower()}",
        DataWarning,
    )
    return header


def _is_decimal(field: str) -> bool:
    return _is_number(field) and not field.strip().lstrip("+-").isdigit()


def _is_text(field: str) -> bool:
    return not _is_number(field) and field.strip().lower() not in MISSING_WORDS


def _is_number(field: str) -> bool:
    return NUMBER.fullmatch(field) is not None
