"""The program that compares estimators, as a person runs it: table, files, choices and mistakes."""

import json
import re

import matplotlib.image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import TINY

QUICK = ["points=12", "measure.times=[1,0.5]", "measure.draws=4", "measure.seconds=0.04", "progress_bar=false"]
UNTRAINED = ["data=gaussian", "field.hidden=[8,8]", "solver=rk4", "solver.step_size=0.5", *QUICK]
CHOICES = ("analytic", "auto", "bottleneck", "exact", "hutch_plus_plus", "hutchinson", "probing", "xtrace")


def test_an_untrained_flow_is_compared(run, tmp_path):
    code, out, err = run("compare_estimators", *UNTRAINED)
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "runs/gaussian/comparisons").iterdir()
    assert str(folder.relative_to(tmp_path)) in out
    assert {path.suffix for path in folder.iterdir()} >= {".json", ".png"}

    content = json.loads((folder / "comparison.json").read_text())
    labels = [row["label"] for row in content["estimators"]]
    first = ["Analytic", "Bottleneck", "Exact", "HutchPlusPlus", "Hutchinson", "Probing(stride=1)", "XTrace"]
    assert labels == [*first, "Hutchinson(probes=orthonormal)"]
    assert (content["checkpoint"], content["data"], content["field"]) == (None, "gaussian", "MLP")
    assert (content["times"], content["points"], content["dtype"]) == ([1.0, 0.5], 12, "float32")
    assert content["chosen"] == {"auto": "Analytic"}
    assert content["not_applicable"] == {"bottleneck_exact": "costs 8 products here, more than the 2 of Exact()"}
    for row in content["estimators"]:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{row['label']} ")]
        assert f"{row['ratio']:.1f}" in line
        assert f"{row['training_ratio']:.1f}" in line
        assert row["training_memory"] > 0
        assert row["exact"] == (row["label"] in ("Analytic", "Exact", "HutchPlusPlus", "XTrace"))
        assert ("exact" in line) == row["exact"]
    advice = content["advice"]
    assert f"For training    {advice['training']}: {advice['training_reason']}" in out
    assert f"For evaluation  {advice['evaluation']}: {advice['evaluation_reason']}" in out

    pixels = matplotlib.image.imread(folder / "comparison.png")
    assert pixels.shape[:2] == (648, 1620)
    assert pixels[..., :3].std() > 0.05
    events = EventAccumulator(str(folder))
    events.Reload()
    (text,) = events.Tensors("estimators/table/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert all(f"    {line}" in table for line in out.splitlines()[:8] if line)
    (picture,) = events.Images("estimators/error_against_cost")
    assert (picture.height, picture.width) == (648, 1620)


def test_a_checkpoint_is_compared_in_the_folder_of_its_run(run, tmp_path):
    assert run("train", *TINY, "output_dir=trained")[0] == 0
    choice = "estimators=[exact,hutchinson,analytic]"
    code, out, err = run("compare_estimators", "checkpoint=trained", choice, *QUICK)
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "trained/comparisons").iterdir()
    content = json.loads((folder / "comparison.json").read_text())
    assert content["checkpoint"] == "trained/checkpoints/best.pt"
    assert [row["label"] for row in content["estimators"]] == ["Exact", "Hutchinson", "Analytic"]
    assert "MLP on points of 2" in out

    code, _, err = run("compare_estimators", "checkpoint=trained", "field=linear", "solver.rtol=1e-3", *QUICK)
    assert code == 2
    assert "field and solver cannot be chosen with a checkpoint, which has its own; leave out field=..." in err
    code, out, _ = run("compare_estimators", "checkpoint=trained", "data=moons", choice, "output_dir=here", *QUICK)
    assert code == 0
    assert json.loads((tmp_path / "here/comparison.json").read_text())["data"] == "moons"


def test_a_new_yaml_is_compared_by_being_there(run, tmp_path):
    (tmp_path / "more/divergence").mkdir(parents=True)
    (tmp_path / "more/divergence/sphere.yaml").write_text(
        "_target_: flows.divergence.Hutchinson\nnum_probes: 1\nprobes: sphere\n"
    )
    here = f"hydra.searchpath=[file://{tmp_path}/more]"
    variant = "+variants.forward={divergence: exact, mode: forward}"
    code, out, err = run("compare_estimators", *UNTRAINED, here, variant, "estimators=[sphere,forward]", "output_dir=o")
    assert (code, err) == (0, "")
    assert "\nHutchinson(probes=sphere) " in out
    assert "\nExact(mode=forward) " in out
    code, out, err = run("compare_estimators", "--config-dir", tmp_path / "more", *UNTRAINED, "output_dir=all")
    assert (code, err) == (0, "")
    assert "\nHutchinson(probes=sphere) " in out
    assert "\nXTrace " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["estimators=[exat]"],
            rf"'exat' is not a choice of divergence; there are {', '.join(CHOICES)}, .*did you mean exact\?",
        ),
        (["checkpoint=nowhere"], "no checkpoint at nowhere; a relative path starts at"),
        (["measure.drws=3"], r"no setting measure.drws \(did you mean draws\?\); measure has times, budgets"),
        (
            ["+variants.x={probes: gaussian}"],
            "the variant 'x' must say which divergence it varies, divergence: analytic",
        ),
        (["+variants.x={divergence: hutchinson, num_probes: 0}"], "num_probes must be >= 1, got 0"),
        (["measure.budgets=[0]"], "budgets must be whole numbers of products >= 1"),
        (["measure.times=[2]"], "times must be one or more numbers from 0"),
        (["part=train"], "part must be test or validation, got 'train'"),
        (["points=1"], "points must be a whole number >= 2, got 1"),
        (["field=nope"], "Could not find 'field/nope'"),
    ],
)
def test_mistakes_get_one_paragraph(run, arguments, message):
    model = [] if arguments[0].startswith("checkpoint=") else ["data=gaussian", "field.hidden=[8,8]"]
    code, _, err = run("compare_estimators", *model, *QUICK, *arguments)
    assert code == 2, err
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_help_names_the_choices_and_examples(run):
    code, out, _ = run("compare_estimators", "--help")
    assert code == 0
    assert out.count("flows compare") >= 3
    assert "python scripts/compare_estimators.py" in out
    assert all(choice in out for choice in (*CHOICES, "8gaussians", "hollow"))
    assert "$" not in out
    assert torch.get_default_dtype() == torch.float32
