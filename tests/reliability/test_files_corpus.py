"""Bad and awkward files: each is read as it is meant, or refused in a paragraph that says what to do."""

from __future__ import annotations

import base64
import contextlib
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from figures import report_figure
from file_recipes import RECIPES, series_rows

from flows.datasets import HubImages, ImageDensity, Series, Tabular, Trajectories
from flows.errors import DataWarning, FlowsError

FOLDER = Path(__file__).parent
OF_SERIES = {"read": "series", "settings": {"id": "id"}, "long": {}}  # what the cases of series.yaml share
CASES = [
    *yaml.safe_load((FOLDER / "files.yaml").read_text(encoding="utf-8")),
    *({**OF_SERIES, **case} for case in yaml.safe_load((FOLDER / "series.yaml").read_text(encoding="utf-8"))),
]
READERS = {"table": Tabular, "images": HubImages, "density": ImageDensity, "series": Trajectories}
SECONDS = 20  # more is a hang
SAMPLE = CASES[::8]


class HangError(BaseException):
    """A file took too long."""


@contextlib.contextmanager
def no_hang(seconds: int):
    def stop(number, frame):
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def numbers(rows: int = 30, columns: int = 2, sep: str = ",", decimal: str = ".", end: str = "\n") -> str:
    """Lines of a text file."""
    values = np.random.default_rng(0).normal(size=(rows, columns)).round(6).tolist()
    return "".join(sep.join(str(v).replace(".", decimal) for v in row) + end for row in values)


def long_form(case: dict) -> bytes:
    """The file of a case of series.yaml."""
    lines = ["id,time,x,y", *(",".join(map(str, row)) for row in series_rows(**case["long"]))]
    for number, line in case.get("set", {}).items():
        lines[number] = line
    recode = {"sep": ",", "end": "\n", "last": "\n", "mark": "", "encoding": "utf-8", **case.get("recode", {})}
    text = recode["end"].join([*lines, *case.get("add", [])]).replace(",", recode["sep"])
    return (recode["mark"] + text + recode["last"]).encode(recode["encoding"])


def written(case: dict, folder: Path) -> object:
    """Write the file of a case; return its path."""
    path = folder / case.get("file", "table.csv")
    if "recipe" in case:
        made = RECIPES[case["recipe"]](path, **case.get("with", {}))
        path = path if made is None else made
    if "path" in case:  # given as it is
        return case["path"].replace("@", str(folder))
    if "recipe" in case:
        return path
    if "base64" in case:
        path.write_bytes(base64.b64decode(case["base64"]))
        return path
    if "long" in case and "text" not in case:
        path.write_bytes(long_form(case))
        return path
    text = case.get("text", "")
    if "lines" in case:
        text += numbers(**case["lines"])
    text += case.get("after", "").replace("@LONG", "9" * 200_000)
    path.write_bytes(text.encode(case.get("encoding", "utf-8")))
    return path


def outcome(case: dict, folder: Path) -> str:
    """Read the file of a case; return what is wrong, or an empty text."""
    path = written(case, folder)
    expected = [str(word) for word in case.get("expect", [])]
    told: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as told, no_hang(SECONDS):
            warnings.simplefilter("always")
            data = READERS[case.get("read", "table")](path=path, **case.get("settings", {}))
    except FlowsError as error:
        text = str(error)
        if not expected:
            return f"refused: {text}"
        missing = [word for word in expected if word not in text]
        lines = f"{text.count(chr(10))} line breaks in {text!r}" if "\n" in text.strip() else ""
        return lines or (f"the message lacks {missing}: {text}" if missing else "")
    except HangError:
        return "a hang"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {error}"
    said = " | ".join(str(warning.message) for warning in told if issubclass(warning.category, DataWarning))
    if expected:
        return f"accepted in silence, expected an error with {expected}"
    missing = [word for word in case.get("warn", []) if word not in said]
    if missing:
        return f"no warning with {missing}, only: {said}"
    if said and "warn" not in case:
        return f"an unexpected warning: {said}"
    strange = [str(w.message) for w in told if not issubclass(w.category, DataWarning)]
    if strange:
        return f"a foreign warning: {strange[0]}"
    found = {"rows": len(data.reference()) + data.num_validation + data.num_test, "columns": data.columns}
    found["shape"] = list(data.event_shape)
    if isinstance(data, Series):
        found["series"] = len(data.ids)
        # Pieces of a series share a point.
        found["points"] = sum(piece.count - (piece.start > 0) for piece in data.examples)
    for key in ("rows", "columns", "shape", "series", "points"):
        if key in case and case[key] != found[key]:
            return f"{key} are {found[key]}, expected {case[key]}"
    if "sum" in case:  # of all values, which a change of any value moves
        total = sum(float(np.sum(rows.astype(np.float64))) for rows in data.rows_for_hashing().values())
        if not np.isclose(total, case["sum"], rtol=1e-9, atol=1e-9):
            return f"the sum of the values is {total}, expected {case['sum']}"
    return ""


def check(case: dict, folder: Path) -> None:
    found = outcome(case, folder)
    assert not found, f"{case['id']}: {found}"


@pytest.mark.parametrize("case", SAMPLE, ids=[case["id"] for case in SAMPLE])
def test_a_sample_of_files(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
def test_all_files(tmp_path, capsys):
    wrong = {}
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        if found := outcome(case, folder):
            wrong[case["id"]] = found
    hangs, tracebacks = (sum(text.startswith(start) for text in wrong.values()) for start in ("a hang", "a traceback"))
    silent = len(wrong) - hangs - tracebacks
    with capsys.disabled():
        report_figure(
            f"bad files: {len(CASES)} cases, {silent} silent or misread, {tracebacks} tracebacks, {hangs} hangs"
        )
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_each_case_has_a_name_of_its_own():
    names = [case["id"] for case in CASES]
    assert len(set(names)) == len(names) >= 150
