"""`DensityEstimator`: a density with the interface of scikit-learn."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import flows
from flows import DensityEstimator
from flows.errors import DataWarning, FlowsError

TINY = {"steps": 2, "polish": 0, "hidden": (8,), "batch_size": 32}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 2)) @ np.array([[30.0, 0.0], [8.0, 1.0]]) + [1000.0, -3.0]
AGE, SEX = RNG.uniform(20, 80, 200), RNG.choice(["f", "m"], 200)
PEOPLE = pd.DataFrame({"age": AGE, "sex": SEX})
HEIGHT = pd.DataFrame({"height": 1.6 + 0.1 * (SEX == "m") + 0.05 * RNG.normal(size=200)})


def tiny(**settings):
    return DensityEstimator(**{**TINY, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def model():
    return tiny(steps=150, hidden=(16,), learning_rate=1e-2, batch_size=128).fit(X)


@pytest.fixture(scope="module")
def conditional():
    return tiny(steps=150, learning_rate=1e-2).fit(HEIGHT, context=PEOPLE)


@pytest.mark.slow
def test_it_passes_the_checks_of_scikit_learn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimator_checks.check_estimator(tiny(), on_fail=None, on_skip=None)
    wrong = {one["check_name"]: one["exception"] for one in found if one["status"] not in ("passed", "skipped")}
    assert not wrong
    assert len(found) > 35


QUICK = (
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_estimators_unfitted",
    "check_estimators_nan_inf",
    "check_estimator_sparse_array",
    "check_fit2d_1sample",
    "check_fit1d",
    "check_complex_data",
    "check_n_features_in_after_fitting",
)


@pytest.mark.parametrize("check", QUICK)
def test_it_passes_quick_checks(check):
    getattr(estimator_checks, check)("DensityEstimator", tiny())


def test_its_density_has_the_units_of_the_data(model):
    gaussian = torch.distributions.MultivariateNormal(torch.from_numpy(X.mean(0)), torch.from_numpy(np.cov(X.T)))
    entropy = float(gaussian.entropy())
    assert model.score(X) == pytest.approx(-entropy, abs=0.25)  # nats, far from those of standardised columns
    assert abs(entropy) > 3
    log_p, error = model.score_samples(X, return_error=True)
    assert log_p.dtype == error.dtype == np.float64
    assert error.max() < 1e-2
    assert model.score(X) == pytest.approx(log_p.mean())
    drawn = model.sample(4000, random_state=0)
    assert np.abs(drawn.mean(0) - X.mean(0)).max() < 4
    assert model.validation_score_ == pytest.approx(model.score(X), abs=0.5)


def test_a_score_does_not_depend_on_other_rows(model):
    whole = model.score_samples(X[:20])
    alone = np.concatenate([model.score_samples(row[None]) for row in X[:20]])
    assert np.abs(whole - alone).max() < 1e-10
    assert np.array_equal(model.score_samples(X[:20].astype(np.float32)), model.score_samples(np.float32(X[:20])))


def test_the_seed_decides():
    one, two, other = (tiny(random_state=seed).fit(X) for seed in (1, 1, 2))
    assert np.array_equal(one.score_samples(X), two.score_samples(X))
    assert not np.array_equal(one.score_samples(X), other.score_samples(X))
    assert np.array_equal(one.sample(3, random_state=5), two.sample(3, random_state=5))
    assert not np.array_equal(one.sample(3, random_state=5), one.sample(3, random_state=6))
    before = torch.get_rng_state()
    tiny().fit(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_frames_keep_their_names():
    frame = pd.DataFrame(X, columns=["pressure", "height"])
    model = tiny().fit(frame)
    assert list(model.feature_names_in_) == ["pressure", "height"]
    assert model.flow_.names.columns == ("pressure", "height")
    drawn = model.sample(3)
    assert isinstance(drawn, pd.DataFrame)
    assert list(drawn.columns) == ["pressure", "height"]
    assert isinstance(tiny().fit(X).sample(), np.ndarray)
    with pytest.raises(FlowsError, match="feature names"):
        model.score_samples(frame[["height", "pressure"]])


def test_it_works_with_the_tools_of_scikit_learn():
    pipeline = make_pipeline(StandardScaler(), tiny())
    assert np.isfinite(cross_val_score(pipeline, X, cv=2)).all()


@pytest.mark.slow
def test_its_settings_can_be_searched():
    search = GridSearchCV(tiny(), {"hidden": [(4,), (8,)]}, cv=2).fit(X)
    assert search.best_params_["hidden"] in ((4,), (8,))


def test_its_parameters_stay_as_they_are():
    field = flows.fields.MLP(2, hidden=(4,))
    copied = clone(tiny(field=field))
    weights = copied.field.out.weight.clone()
    assert torch.equal(copied.fit(X).field.out.weight, weights)  # a parameter stays as it is


def test_it_can_be_pickled_and_saved(conditional, tmp_path):
    people = PEOPLE[:5]
    expected = conditional.score_samples(HEIGHT[:5], people)
    pickled = pickle.loads(pickle.dumps(conditional))
    assert np.array_equal(pickled.score_samples(HEIGHT[:5], people), expected)
    back = flows.load(flows.save(conditional, tmp_path / "m.flow"))
    assert isinstance(back, DensityEstimator)
    assert np.array_equal(back.score_samples(HEIGHT[:5], people), expected)
    assert back.sample(2, people, random_state=0).equals(conditional.sample(2, people, random_state=0))
    assert back.get_params()["hidden"] == conditional.get_params()["hidden"]
    assert list(back.feature_names_in_) == ["height"]
    with pytest.raises(NotFittedError):
        flows.save(tiny(), tmp_path / "m.flow")


def test_densities_given_a_context(conditional):
    assert conditional.conditions_.columns == ("age", "sex")
    man, woman = ({"age": 40.0, "sex": sex} for sex in "mf")
    tall = pd.DataFrame({"height": [1.75]})
    assert conditional.score_samples(tall, man)[0] > conditional.score_samples(tall, woman)[0]
    drawn = conditional.sample(200, [man, woman], random_state=0)["height"].to_numpy()
    assert drawn[:200].mean() > drawn[200:].mean() + 0.05
    rows = conditional.score_samples(HEIGHT[:3], PEOPLE[:3])
    alone = [conditional.score_samples(HEIGHT[i : i + 1], PEOPLE[i : i + 1])[0] for i in range(3)]
    assert np.abs(rows - alone).max() < 1e-10
    with pytest.raises(FlowsError, match="fitted with a context, and needs one"):
        conditional.score_samples(HEIGHT)
    with pytest.raises(FlowsError, match="unknown category 'x'; known are 'f', 'm'"):
        conditional.sample(1, {"age": 40.0, "sex": "x"})
    with pytest.raises(FlowsError, match="one row for each of X, 3, or a single one, got 2"):
        conditional.score_samples(HEIGHT[:3], PEOPLE[:2])
    with pytest.raises(FlowsError, match="'age' has 3 entries, and X has 200 rows"):
        tiny().fit(HEIGHT, context=PEOPLE[:3])
    numbers = tiny().fit(HEIGHT, context=AGE)
    assert numbers.score_samples(HEIGHT, AGE).shape == (200,)
    with pytest.raises(FlowsError, match="fitted without a context, and takes none"):
        tiny().fit(X).sample(2, context=[[1.0]])


def test_samples_of_several_contexts_say_of_which(conditional):
    given = pd.DataFrame({"age": [30.0, 60.0], "sex": ["m", "f"]})
    drawn = conditional.sample(2, context=given, random_state=0)
    assert drawn.reset_index().columns.tolist() == ["age", "sex", "height"]
    assert drawn.index.tolist() == [(30, "m"), (30, "m"), (60, "f"), (60, "f")]
    assert conditional.score_samples(drawn, context=drawn.reset_index()).shape == (4,)
    assert conditional.sample(2, context={"age": 30.0, "sex": "m"}).index.tolist() == [0, 1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_warnings_name_the_line_of_the_user(wrapped):
    rounded = X.round(-1)
    model = make_pipeline(StandardScaler(), tiny()) if wrapped else tiny()
    with pytest.warns(DataWarning) as told:
        model.fit(rounded)
    assert {warning.filename for warning in told} == {__file__}


def test_contexts_are_routed():
    import sklearn

    with sklearn.config_context(enable_metadata_routing=True):
        model = tiny().set_fit_request(context=True).set_score_request(context=True)
        scores = cross_val_score(model, HEIGHT, params={"context": AGE}, cv=2)
    assert np.isfinite(scores).all()


BAD = {
    "NaN": ({}, np.where(np.arange(400).reshape(200, 2) == 3, np.nan, X), "contains NaN"),
    "few rows": ({}, X[:4], r"4 sample\(s\).*minimum of 5"),
    "one dimension": ({}, X[:, 0], "Expected 2D array"),
    "constant": ({}, np.c_[X, np.ones(200)], "column '2' holds the same value in all rows.*leave it out"),
    "steps": ({"steps": 0}, X, "steps must be a whole number >= 1, got 0"),
    "steps as text": ({"steps": "many"}, X, "steps must be a whole number"),
    "polish": ({"polish": -1}, X, "polish must be a whole number >= 0, got -1"),
    "hidden": ({"hidden": (0,)}, X, "hidden must be"),
    "one width": ({"hidden": 4}, X, r"hidden must be a list of widths, such as \(64, 64\), got 4"),
    "words": (
        {},
        pd.DataFrame({"a": AGE, "sex": SEX}),
        "could not convert string to float: .*column 'sex' holds no numbers: leave it out, or pass it as context",
    ),
    "rate": ({"learning_rate": -1.0}, X, "learning_rate must be"),
    "fraction": ({"validation_fraction": 1.5}, X, "validation_fraction must be"),
    "patience": ({"patience": 0}, X, "patience must be a whole number >= 1, got 0; None never ends"),
    "base": ({"base": "gauss"}, X, "base: unknown Base 'gauss'; expected one of .*student_t"),
    "divergence": ({"divergence": "skew"}, X, "unknown DivergenceEstimator 'skew'"),
    "solver": ({"solver": "rk5"}, X, "solver: unknown method 'rk5'; expected one of .*rk4"),
    "field": ({"field": 3}, X, "field must be a module, or what makes one"),
}


@pytest.mark.parametrize(("settings", "data", "words"), [*BAD.values()], ids=[*BAD])
def test_bad_input_says_what_to_do(settings, data, words):
    with pytest.raises(FlowsError, match=words):
        tiny(**settings).fit(data)


def test_weights_of_samples_are_refused():
    with pytest.raises(TypeError, match="sample_weight"):
        tiny().fit(X, sample_weight=np.ones(200))


def test_thirty_rows_are_enough():
    model = tiny(steps=20).fit(X[:30])
    assert np.isfinite(model.score_samples(X)).all()


def test_repeated_values_warn_and_can_be_spread():
    rounded = np.c_[X[:, 0], RNG.integers(0, 4, 200)]
    with pytest.warns(DataWarning, match="'1'"):
        tiny().fit(rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny(dequantise_columns=["1"]).fit(rounded)
    assert np.isfinite(model.score(rounded))


def test_parts_can_be_swapped():
    model = tiny(field=flows.fields.Planar, base="student_t", divergence="hutchinson", solver="dopri5", polish=2).fit(X)
    assert isinstance(model.flow_.field, flows.fields.Planar)
    assert isinstance(model.flow_.base, flows.bases.StudentT)
    assert model.flow_.solver.method == "dopri5"
    assert model.n_steps_ == 4
    _, error = model.score_samples(X[:5], return_error=True)
    assert error.max() < 1e-2  # of the solver alone: scores are exact


def test_a_run_leaves_what_was_asked_for(tmp_path, capfd):
    few = X[:40]
    model = tiny(steps=6, output_dir=tmp_path / "run", progress_bar=True).fit(few)
    assert (tmp_path / "run/checkpoints/best.pt").exists()
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert "flow_matching" in capfd.readouterr().err
    kept = flows.load(tmp_path / "run").log_prob(torch.from_numpy(few)).detach().numpy()
    assert np.abs(kept - model.score_samples(few)).max() < 1e-2


@pytest.mark.parametrize(("name", "data", "context"), [("table", X, None), ("conditional_table", HEIGHT, PEOPLE)])
def test_its_defaults_are_a_recipe(name, data, context, tmp_path, monkeypatch):
    """What `fit` trains is what `experiment=...` trains."""
    from flows.arguments import Built
    from flows.cli.config import compose
    from flows.training.settings import instantiate

    found = {}

    def kept(self):
        found["trainer"] = self
        raise InterruptedError

    monkeypatch.setattr(flows.Trainer, "fit", kept)
    with pytest.raises(InterruptedError):
        DensityEstimator().fit(data, context=context)
    trainer, settings = found["trainer"], compose("train", [f"experiment={name}"])
    for stage, own in trainer.stages.items():
        expected = instantiate(settings["objective"][stage], stage)
        assert (own.steps, own.batch_size, own.learning_rate) == (
            expected.steps,
            expected.batch_size,
            expected.learning_rate,
        )
        assert type(own.objective) is type(expected.objective)
        assert (own.warmup_steps, own.patience) == (expected.warmup_steps, expected.patience)
    assert list(trainer.stages) == list(settings["objective"])
    field = Built.of(trainer.model.field).arguments
    hidden, activation, sine = (settings["field"][key] for key in ("hidden", "activation", "sine_frequency"))
    assert (list(field["hidden"]), field["activation"], field["sine_frequency"]) == (list(hidden), activation, sine)
    assert trainer.optimization.ema_decay == settings["optimization"]["ema_decay"]
    optimizer = instantiate(settings["optimizer"], "optimizer")([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    own = trainer.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert type(own) is type(optimizer)
    assert own.defaults["weight_decay"] == optimizer.defaults["weight_decay"]
    assert trainer.reporting.validate_every == settings["reporting"]["validate_every"]
    encoder = settings.get("encoder")
    assert (encoder is None) == (trainer.model.encoder is None)


def test_a_base_of_contexts_by_name():
    model = tiny(base="conditional_normal").fit(HEIGHT, context=PEOPLE)
    assert isinstance(model.flow_.base, flows.bases.ConditionalNormal)
    with pytest.raises(FlowsError, match="unknown Base 'conditional_normal'; expected one of"):
        tiny(base="conditional_normal").fit(X)
