"""Every yaml of every group is composed, instantiated and trained for two steps; a new one is found by itself."""

import itertools
import re
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from small_run import QUIET

from flows.cli.config import compose_node, plain_warnings
from flows.cli.help import config_folder
from flows.datasets import Table
from flows.errors import DataWarning
from flows.training import check_trusted
from flows.training.annotations import SettingsError
from flows.training.building import accepted, build_flow
from flows.training.runs import build_trainer
from flows.training.settings import complete, instantiate

CONF = config_folder()
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
FEW = 6  # points to evaluate on: 32 of all would be solved again with a fraction of the step
SHAPES = [(2,), (1, 4, 4), (4, 3)]  # vectors, small images, point sets


def composed(tmp_path, *overrides):
    """The settings of a run, made tiny; on a Gaussian in the plane where an experiment does not say otherwise."""
    data = [] if any(override.startswith("experiment=") for override in overrides) else ["data=gaussian"]
    config = compose_node("train", [*data, f"output_dir={tmp_path / 'run'}", *overrides])
    config = OmegaConf.create(complete(OmegaConf.to_container(config)))
    for stage in config.objective.values():
        stage.steps, stage.batch_size, stage.warmup_steps = 2, 6, 0
    if ".Conditional" in config.get("base", {}).get("_target_", ""):
        config.base.steps = 2
    for part, tiny in ((config.data, 20), (config.field, 8), (config.field.get("field", {}), 8)):
        for key in part:
            if key in (
                "num_validation",
                "num_test",
                "num_simulations",
                "width",
                "num_units",
                "channels",
                "num_channels",
                "num_kernels",
            ):
                part[key] = tiny
            elif key in ("validation_fraction", "test_fraction") and part[key] is not None:
                part[key] = 0.03
            elif key in ("span", "beyond"):  # of series, which untrained fields leave fast
                part[key] = 1.0
            elif key == "hidden":
                part[key] = tiny if isinstance(part[key], int) else [tiny] * len(part[key])
    config.reporting.update(QUIET | {"validate_every": 0})
    config.hardware.accelerator = "cpu"
    if "solver_error_points" in config.evaluation:
        config.evaluation.update(solver_error_points=0, points=FEW)
    if config.solver.get("step_size") is not None and config.solver.method != "implicit_adams":  # would not converge
        config.solver.step_size = max(config.solver.step_size, 0.25)
    return config


class Points(Table):
    """Normal noise of any event shape."""

    def __init__(self, event_shape):
        size = torch.Size(event_shape).numel()
        super().__init__(torch.randn(30, size, generator=torch.Generator().manual_seed(0)))
        self._parts, self._held_out = (
            {part: rows.reshape(-1, *event_shape) for part, rows in parts.items()}
            for parts in (self._parts, self._held_out)
        )
        self.event_shape = event_shape

    def rows_for_hashing(self):
        return {part: rows.flatten(1).numpy() for part, rows in self._parts.items()}


NEEDS_INPUTS = "forced"  # a field for series with inputs; the rest of these data have none


def first_shape(field):
    """The first event shape that a field is made for."""
    for shape in SHAPES:
        try:
            instantiate(field, "field", **accepted(field, {"event_shape": shape}))
        except SettingsError:
            continue
        return shape
    raise AssertionError(f"{field} takes none of the event shapes {SHAPES}")


def first_pair(tmp_path, fields, divergences):
    """The settings, and the event shape, of the first of these fields and estimators that go together."""
    for field, divergence in itertools.product(fields, divergences):
        quick = ("solver=rk4", "solver.step_size=0.25")
        config = composed(tmp_path, f"divergence={divergence}", f"field={field}", *quick)
        if divergence == "auto":
            config.divergence.max_products = 4
        shape = first_shape(config.field)
        try:
            build_flow(config, shape).log_prob(torch.randn(3, *shape))
        except (ValueError, TypeError):
            continue
        return config, shape
    raise AssertionError(f"none of the fields {fields} goes with any of {divergences}")


def fitted(config, dataset):
    """The summary of a run; without flow matching where the field says that it cannot be trained by it."""
    try:
        return build_trainer(config, dataset=dataset).fit()
    except ValueError as refusal:
        if "choose objective=maximum_likelihood" not in str(refusal):
            raise
        config["objective"].pop("flow_matching")
        config["output_dir"] += "_again"  # the first attempt has saved its start
        return build_trainer(config, dataset=dataset).fit()


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(",".join(f"{value:.6f}" for value in row) for row in rows))
    return path


@pytest.fixture
def long_table(tmp_path):
    """40 series of six points in long form."""
    path = tmp_path / "series.csv"
    x = torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [f"{i},{j},{a:.4f},{b:.4f}" for i, series in enumerate(x) for j, (a, b) in enumerate(series)]
    path.write_text("\n".join(["id,time,x,y", *rows]))
    return path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of coloured noise in three parts and two classes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("validation", 3), ("test", 3)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


COSTLY = {  # over ten seconds, and much like a choice that is tested by default
    ("experiment", "mnist"),
    ("experiment", "photo_patches"),
    ("field", "unet"),  # experiment=cifar10 trains one
    ("field", "unet_small"),
    ("solver", "adaptive_heun"),
}
TRAINED = [
    pytest.param(*choice, id="=".join(choice), marks=pytest.mark.slow if choice in COSTLY else ()) for choice in CHOICES
]


@pytest.mark.parametrize(("group", "name"), TRAINED)
def test_every_choice_trains(tmp_path, request, group, name):
    overrides = [f"{group}={name}"]
    text = (CONF / group / f"{name}.yaml").read_text()
    data = re.search(r"override /data: (\w+)", text)
    if "ImageFiles" in (text if data is None else (CONF / "data" / f"{data[1]}.yaml").read_text()):
        overrides.append(f"data.path={request.getfixturevalue('pictures')}")
    elif (group, name) == ("data", "trajectories"):
        overrides += [f"data.path={request.getfixturevalue('long_table')}", "data.id=id", "data.time=time"]
    elif (group, name) == ("data", "uci"):
        np.savetxt(tmp_path / "data.txt", np.random.default_rng(0).normal(size=(60, 3)))
        (tmp_path / "test_rows_0.txt").write_text("0 1 2 3 4 5")
        overrides.append(f"data.path={tmp_path}")
    elif (group, name) == ("data", "large_table"):
        np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60, 3)))
        overrides += [f"data.path={tmp_path / 'rows.npy'}", "data.num_validation=5", "data.num_test=5"]
    elif (group, name) == ("data", "streamed_images"):
        pictures = [path.read_bytes() for path in request.getfixturevalue("pictures").glob("train/*/*.png")]
        pq.write_table(pa.table({"image": 4 * pictures}), tmp_path / "rows.parquet")
        overrides.append(f"data.path={tmp_path / 'rows.parquet'}")
    elif group == "data" and "path: ???" in text:
        overrides.append(f"data.path={request.getfixturevalue('table')}")
    elif (group, name) == ("data", "simulator"):
        pytest.skip("its function is the user's; see tests/test_simulators.py")
    elif group == "encoder" or (group, name) == ("evaluation", "posterior") or name.startswith("conditional_"):
        overrides.insert(0, "data=gaussian_mean")
    elif group == "transform" and "dequantise" in text:
        overrides.insert(0, "data=digits")
    elif "\n# an energy without samples" in f"\n{text}":
        overrides += ["objective=reverse_kl"]
    elif (group, name) == ("evaluation", "energy"):
        overrides.insert(0, "data=double_well")
    elif group != "experiment" and re.search("NeuralODE|[tT]rajectory|[dD]erivative_?[mM]atching", text):
        overrides.insert(0, "data=spiral")
    dataset = None
    if group == "divergence":
        others = (other for kind, other in CHOICES if kind == "field" and other not in ("mlp", NEEDS_INPUTS))
        fields = ["mlp", *others]
        config, shape = first_pair(tmp_path, fields, [name])
        dataset = Points(shape)
    elif (group, name) == ("field", NEEDS_INPUTS):
        overrides[:0] = ["data=trajectories", f"data.path={request.getfixturevalue('long_table')}", "data.id=id"]
        config = composed(tmp_path, *overrides, "data.columns=[x]", "data.input_columns=[y]")
    elif group == "field":
        config, shape = first_pair(tmp_path, [name], ["auto"])
        dataset = Points(shape)
    else:
        config = composed(tmp_path, *overrides)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_trusted(plain)  # so that the run's checkpoint can be loaded again
    summary = fitted(plain, dataset)
    assert summary.position.step == 2 * len(plain["objective"])
    assert abs(summary.validation_score) < 1e6


def test_every_group_is_a_default_of_train():
    defaults = OmegaConf.load(CONF / "train.yaml").defaults
    assert {key for entry in defaults if OmegaConf.is_dict(entry) for key in entry if "override" not in key} == set(
        GROUPS
    )


def test_the_default_run_goes_through_both_stages(tmp_path):
    config = compose_node("train", ["output_dir=x", "objective.flow_matching.steps=7"])
    assert list(config.objective) == ["flow_matching", "maximum_likelihood"]
    assert config.objective.flow_matching.steps == 7
    assert config.data["_target_"] == "flows.datasets.EightGaussians"


def test_data_sets_choose_a_transform_and_the_user_another(tmp_path):
    chosen = {}
    for overrides in (["data=moons"], ["data=digits"], ["transform=dequantise_variational", "data=digits"]):
        config = compose_node("train", ["output_dir=x", *overrides])
        chosen[" ".join(overrides)] = config.transform
    moons, digits, other = chosen.values()
    assert moons["_target_"] == "flows.transforms.Standardise"
    assert digits.dequantise.noise["_target_"] == "flows.transforms.UniformNoise"
    assert list(digits) == ["_target_", "dequantise", "unit", "logit", "standardise"]
    assert other.dequantise.noise["_target_"] == "flows.transforms.VariationalNoise"
    assert list(other) == list(digits)


def test_warnings_of_data_are_shown_without_their_place_in_the_code():
    with plain_warnings():
        assert warnings.formatwarning("digits are lost", DataWarning, "x.py", 1) == "Warning: digits are lost\n"
        assert "x.py:1: UserWarning: something else" in warnings.formatwarning("something else", UserWarning, "x.py", 1)
    assert "x.py:1: DataWarning" in warnings.formatwarning("digits are lost", DataWarning, "x.py", 1)
