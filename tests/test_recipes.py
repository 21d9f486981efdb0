"""The page of recipes is executed, with few steps, on small files that are written here."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_readme import DOCS, blocks

PAGE = (DOCS / "how_to/recipes.md").read_text(encoding="utf-8")
SHORT = {
    "table": ["steps=4", "reporting.plot_every=null", "data.test_fraction=0.3"],
    "people": ["steps=4", "reporting.plot_every=null", "data.test_fraction=0.3"],
    "pictures": ["steps=2", "reporting.plot_every=null", "field.channels=4", "evaluation.points=4"],
    "series": ["steps=2", "reporting.plot_every=null"],
}


def write_files():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(80, 2)), columns=["height", "width"])
    table.to_csv("table.csv", index=False)
    (table.iloc[:3] + 0.1).to_csv("new_rows.csv", index=False)
    sex = rng.choice(["f", "m"], 80)
    people = pd.DataFrame({"weight": rng.normal(70, 8, 80), "age": rng.uniform(20, 80, 80), "sex": sex})
    people.to_csv("people.csv", index=False)
    rows = [(p, h, 5 + np.cos(p + h), 40 + 5 * np.sin(p + h)) for p in range(10) for h in np.arange(6) / 2]
    series = pd.DataFrame(rows, columns=["patient", "hour", "glucose", "insulin"])
    series.to_csv("series.csv", index=False)
    series[series.hour == 0].to_csv("first.csv", index=False)
    for name, level in (("circle", 40), ("square", 200)):
        for i in range(12):
            path = f"pictures/{name}"
            Path(path).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(level - 40, level + 40, (8, 8), dtype=np.uint8)).save(f"{path}/{i}.png")


@pytest.mark.parametrize("block", blocks(PAGE, "bash"), ids=lambda block: re.search(r"output_dir=runs/(\w+)", block)[1])
def test_recipes_run(block, run, tmp_path):
    write_files()
    name = re.search(r"output_dir=runs/(\w+)", block)[1]
    for command in block.strip().splitlines():
        script, *arguments = shlex.split(command)[1:]
        script = script.removeprefix("scripts/").removesuffix(".py")
        code, _, err = run(script, *arguments, *(SHORT[name] if script == "train" else ()))
        assert code == 0, err
    outputs = re.findall(r"(?:output|rows)=(\S+)", block)
    assert all((tmp_path / output).stat().st_size for output in outputs)
