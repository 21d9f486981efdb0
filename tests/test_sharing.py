"""Models are saved with what builds them again, and come back bit for bit."""

import copy
import functools
import json
import re
import sys
import types

import pytest
import torch
from small_run import small_trainer
from torch import distributions as D
from torch import nn

import flows
from flows import bases, fields, transforms
from flows.arguments import Built
from flows.conditions import Conditions
from flows.errors import FileError, InvalidTypeError, InvalidValueError, MissingPackageError
from flows.training.checkpoint import CheckpointError, DamagedCheckpointError
from flows.training.described import UndescribedError
from flows.training.trusted import UntrustedConfigError

CONDITIONS = Conditions(["age", "sex"], {"sex": ["f", "m"]})
POINTS = torch.tensor([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float64)


def mlp(**settings):
    return fields.MLP(2, hidden=(8,), **settings)


def fitted(base):
    flow = flows.CNF(mlp(), base=base, transform=transforms.Standardise(2))
    return flow.fit_ends(3 + 5 * torch.randn(300, 2))


def image_flow(field, transform=None):
    return flows.CNF(field, transform=transform, divergence="hutchinson", solver=flows.ODESolver("rk4", step_size=0.5))


def dequantise(noise):
    parts = {"dequantise": transforms.Dequantise(16, noise), "unit": transforms.UnitInterval(16)}
    return transforms.Compose(
        **parts, logit=transforms.Logit(0.1), last=transforms.Standardise((1, 4, 4), per="channel")
    )


def conditional():
    encoder = flows.encoders.Embedding(2, features=3, hidden=(4,), conditions=CONDITIONS)
    flow = flows.CNF(mlp(context_shape=3), encoder=encoder)
    encoder.fit(CONDITIONS.encode({"age": [20, 40, 60], "sex": ["f", "m", "m"]}))
    return flow


BASES = {
    "normal": lambda: bases.Normal(2, mean=[1.0, 2.0], covariance=torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "trainable": lambda: bases.Normal(2, trainable=True),
    "student_t": lambda: bases.StudentT(2, df=3.0, scale=torch.tensor([1.0, 2.0])),
    "mixture": lambda: bases.Mixture(2, means=torch.randn(3, 2), weights=[0.2, 0.3, 0.5]),
    "laplace": lambda: D.Laplace(torch.zeros(2), torch.ones(2)),
    "gumbel": lambda: D.Gumbel(torch.zeros(2), torch.ones(2)),
    "full": lambda: D.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])),
    "torch_mixture": lambda: D.MixtureSameFamily(
        D.Categorical(torch.ones(3)), D.Independent(D.Normal(torch.randn(3, 2), torch.ones(3, 2)), 1)
    ),
    "flow": lambda: bases.FlowBase(flows.CNF(mlp(), base=bases.StudentT(2)), trainable=True),
}
FIELDS = {
    "concat_squash": lambda: fields.ConcatSquashMLP(2, hidden=(8,)),
    "hollow": lambda: fields.Hollow(2, hidden=(8,)),
    "linear": lambda: fields.Linear(2, matrix=torch.randn(2, 2)),
    "planar": lambda: fields.Planar(2, num_units=4),
    "potential": lambda: fields.Potential(2, width=8),
    "sine": lambda: mlp(activation=fields.Sine()),
    "elementwise": lambda: mlp(activation=fields.Elementwise(nn.Softplus(2.0))),
}
IMAGES = {
    "conv": lambda: image_flow(
        fields.ConvNet((1, 4, 4), hidden=(4,)), dequantise(transforms.TruncatedNormalNoise(0.2))
    ),
    "multiscale": lambda: image_flow(fields.Multiscale((1, 4, 4), functools.partial(fields.ConvNet, hidden=(4,)))),
    "unet": lambda: image_flow(fields.UNet((1, 4, 4), channels=4, multipliers=(1,), num_heads=1)),
}
OTHERS = {
    "plain": lambda: flows.CNF(mlp()),
    "fitted mixture": lambda: fitted(bases.Mixture(2, num_components=2)),
    "fitted normal": lambda: fitted(bases.Normal(2, fit=True)),
    "bounded": lambda: flows.CNF(
        mlp(), transform=transforms.Unbounded(2, bounds=(torch.tensor([-9.0, -torch.inf]), [9.0, 3.0]))
    ),
    "periodic": lambda: flows.CNF(fields.PeriodicConv((1, 2), num_channels=4, kernel_size=1), event_shape=(1, 2)),
    "solver": lambda: flows.CNF(
        mlp(),
        divergence=flows.divergence.Hutchinson(num_probes=3),
        solver=flows.ODESolver(rtol=1e-3, error_control=flows.solvers.ErrorControl(per_sample=True)),
    ),
}


def loaded(model, tmp_path, **options):
    return flows.load(flows.save(model, tmp_path / "model.flow", **options))


def assert_same(model, other):
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not other.training


@pytest.mark.parametrize("make", [*BASES.values()], ids=[*BASES])
def test_every_base_comes_back(make, tmp_path):
    flow = flows.CNF(mlp(), base=make()).eval()
    back = loaded(flow, tmp_path)
    assert_same(flow, back)
    assert type(back.base) is type(flow.base)
    assert torch.equal(back.log_prob(POINTS), flow.log_prob(POINTS))


def test_tensors_without_plain_strides_are_saved(tmp_path):
    """Those of a repeated number, and of a transposed matrix."""
    field = mlp()
    for name, value in {
        "once": torch.ones(()).expand(1),
        "turned": torch.rand(2, 3).T,
    }.items():
        field.register_buffer(name, value)
    flow = flows.CNF(field)
    path = flows.save(flow, tmp_path / "model.flow", weights_only=True)
    assert_same(flow, flows.load(path, flow=copy.deepcopy(flow)))


@pytest.mark.parametrize("make", [*FIELDS.values()], ids=[*FIELDS])
def test_every_field_comes_back(make, tmp_path):
    flow = flows.CNF(make()).eval()
    back = loaded(flow, tmp_path)
    assert_same(flow, back)
    assert torch.equal(back.log_prob(POINTS), flow.log_prob(POINTS))


@pytest.mark.parametrize("make", [*IMAGES.values()], ids=[*IMAGES])
def test_flows_of_images_come_back(make, tmp_path):
    flow = make().eval()
    back = loaded(flow, tmp_path)
    assert_same(flow, back)
    x = torch.randint(16, (2, 1, 4, 4)).double()
    found, again = (one.log_prob(x, generator=torch.Generator().manual_seed(0)) for one in (flow, back))
    assert torch.equal(found, again)


@pytest.mark.parametrize("make", [*OTHERS.values()], ids=[*OTHERS])
def test_flows_come_back(make, tmp_path):
    flow = make().eval()
    back = loaded(flow, tmp_path)
    assert_same(flow, back)
    assert back.solver == flow.solver
    assert back.divergence == flow.divergence


@pytest.mark.parametrize("base", [lambda: bases.Uniform(2), lambda: bases.Empirical(points=torch.randn(50, 2))])
def test_sources_without_a_density_come_back(base, tmp_path):
    flow = flows.CNF(mlp(), base=base()).eval()
    back = loaded(flow, tmp_path)
    draws = [one.sample(3, generator=torch.Generator().manual_seed(0)) for one in (flow, back)]
    assert torch.equal(*draws)


def test_the_points_of_a_source_are_in_the_file_once(tmp_path):
    points = torch.randn(10_000, 2)
    path = flows.save(flows.CNF(mlp(), base=bases.Empirical(points=points)), tmp_path / "m.flow")
    assert path.stat().st_size < 1.2 * points.nbytes


def test_contexts_stay_in_data_units(tmp_path):
    flow = conditional().eval()
    back = loaded(flow, tmp_path)
    assert_same(flow, back)
    assert back.encoder.conditions == CONDITIONS
    person = back.encoder.contexts({"age": 33, "sex": "m"})
    assert torch.equal(back.log_prob(POINTS, person), flow.log_prob(POINTS, person))
    guided = loaded(flow.guided(2.0), tmp_path)
    assert torch.equal(guided.log_prob(POINTS, person), flow.guided(2.0).log_prob(POINTS, person))


def test_neural_odes_come_back(tmp_path):
    known = fields.Physics(
        flows.equations.lotka_volterra,
        2,
        parameters={"alpha": 1.2, "beta": {"start": 1.0, "low": 0.0}},
        correction=mlp(),
        correction_scale=0.1,
    )
    driven = fields.Forced(
        functools.partial(fields.MLP, hidden=(8,), num_frequencies=0),
        times=[0.0, 1.0, 2.0],
        values=torch.randn(3, 1),
        event_shape=2,
    )
    times = torch.linspace(0, 1, 5)
    for field in (known, driven):
        ode = flows.NeuralODE(field, transform=transforms.Standardise(2), noise=0.1).eval()
        back = loaded(ode, tmp_path)
        assert_same(ode, back)
        assert torch.equal(back.trajectory(POINTS, times).states, ode.trajectory(POINTS, times).states)


def test_posteriors_come_back(tmp_path):
    flow = flows.CNF(mlp(context_shape=3))
    posterior = flows.Posterior(flow, flows.datasets.box([-1.0, -1.0], [1.0, 2.0]), torch.tensor([3.0, 1.0, 0.5]))
    back = loaded(posterior, tmp_path)
    assert isinstance(back, flows.Posterior)
    assert torch.equal(back.x, posterior.x)
    assert torch.equal(back.prior.bounds[1], posterior.prior.bounds[1])
    assert torch.equal(back.log_prob(POINTS), posterior.log_prob(POINTS))
    flow.names = flow.names.of({"columns": ["a", "b"], "class_names": ["left", "right"], "num_classes": 2})
    again = loaded(flows.Posterior(flow), tmp_path)
    assert again.x is None
    assert again.flow.names == flow.names


def seeded_log_prob(flow):
    return flow.log_prob(POINTS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def python_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = small_trainer(folder)
    trainer.fit()
    return folder, trainer.model


def test_runs_started_from_python_load_without_their_program(python_run, tmp_path):
    folder, model = python_run
    back = flows.load(folder)
    expected = seeded_log_prob(model)
    assert torch.equal(seeded_log_prob(back), expected)
    assert back.names == model.names
    again = loaded(back, tmp_path)
    assert torch.equal(seeded_log_prob(again), expected)
    assert again.names == model.names


def test_folders_hold_one_model(tmp_path):
    assert flows.save(OTHERS["plain"](), tmp_path) == tmp_path / "model.safetensors"
    assert isinstance(flows.load(tmp_path), flows.CNF)
    assert isinstance(flows.load(str(tmp_path)), flows.CNF)


def test_other_programs_read_the_tensors(tmp_path):
    from safetensors import safe_open

    flow = OTHERS["plain"]()
    with safe_open(flows.save(flow, tmp_path / "m.flow"), "pt") as file:
        assert torch.equal(file.get_tensor("field.out.weight"), flow.field.out.weight)
        assert "flows.fields.MLP" in file.metadata()["settings"]


class Stranger(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, t, x):
        return self.layers(x)


class Guest(fields.Field):
    def __init__(self, width, *, scale=1.0):
        super().__init__(2, None)
        self.layer, self.scale = nn.Linear(2, 2), scale

    def forward(self, t, x, context=None):
        return self.scale * self.layer(x)


class Configured(Guest):
    def __init__(self, config=None):
        super().__init__(3, scale=2.0 if config is None else config.scale)


@pytest.fixture
def guests(monkeypatch):
    module = types.ModuleType("my_package")
    for kind in (Stranger, Guest, Configured):
        monkeypatch.setattr(kind, "__module__", "my_package")
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "my_package", module)


@pytest.mark.usefixtures("guests")
def test_fields_of_strangers_say_how(tmp_path):
    flow, path = flows.CNF(Stranger(5), event_shape=2), tmp_path / "m.flow"
    with pytest.raises(UndescribedError, match=r"field is a Stranger, .*settings={'field': .*weights_only=True"):
        flows.save(flow, path)
    assert not path.exists()
    flows.save(flow, path, settings={"field": {"_target_": "my_package.Stranger", "width": 5}})
    with pytest.raises(UntrustedConfigError, match=r"pass trust=\[my_package\]"):
        flows.load(path)
    assert torch.equal(flows.load(path, trust=["my_package"]).log_prob(POINTS), flow.log_prob(POINTS))
    with pytest.raises(UndescribedError, match=r"do not build this model again: .*layers.0.weight has the shape"):
        flows.save(flow, path, settings={"field": {"_target_": "my_package.Stranger", "width": 6}})
    flows.save(flow, path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"build the flow yourself and call flows.load\(path, flow=flow\)"):
        flows.load(path)
    other = flows.CNF(Stranger(5), event_shape=2)
    assert torch.equal(flows.load(path, flow=other).log_prob(POINTS), flow.log_prob(POINTS))
    with pytest.raises(InvalidValueError, match="settings has 'fields', which is no part of a model"):
        flows.save(flow, path, settings={"fields": {}})


@pytest.mark.usefixtures("guests")
def test_subclasses_of_strangers_need_trust_alone(tmp_path):
    flow = flows.CNF(Guest(3, scale=0.5))
    assert Built.of(flow.field).arguments == {"width": 3, "scale": 0.5}
    path = flows.save(flow, tmp_path / "m.flow")
    with pytest.raises(UntrustedConfigError, match=r"my_package\.Guest"):
        flows.load(path)
    assert torch.equal(flows.load(path, trust=["my_package"]).log_prob(POINTS), flow.log_prob(POINTS))
    odd = flows.CNF(Configured(types.SimpleNamespace(scale=3.0)))
    with pytest.raises(UndescribedError, match="the argument config of Configured"):
        flows.save(odd, path)


def test_classes_that_nobody_can_import_say_so(tmp_path):
    class Local(fields.MLP):
        pass

    with pytest.raises(UndescribedError, match="no other program can import by its name"):
        flows.save(flows.CNF(Local(2)), tmp_path / "m.flow")
    with pytest.raises(InvalidTypeError, match=r"must be a flows.CNF.*got an object of class Linear"):
        flows.save(nn.Linear(2, 2), tmp_path / "m.flow")


def test_models_that_were_changed_are_refused(tmp_path):
    flow = OTHERS["plain"]()
    flow.field.out = nn.Linear(8, 2, bias=False)
    with pytest.raises(UndescribedError, match=r"field.out.bias is missing.*changed"):
        flows.save(flow, tmp_path / "m.flow")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return flows.save(OTHERS["plain"](), tmp_path_factory.mktemp("model") / "m.flow").read_bytes()


DAMAGE = {
    "header": lambda data: data[:100],
    "end": lambda data: data[:-5],
    "flipped weights": lambda data: data[:-3] + b"\1\2\3",
    "huge header": lambda data: b"\xff" * 8 + data[8:],
    "settings": lambda data: data.replace(b"flows.fields.MLP", b"flows.fields.UNe"),
    "dtype": lambda data: re.sub(rb'"F(64|32)"', b'"F16"', data, count=1),
    "shape": lambda data: data.replace(b'"shape":[2]', b'"shape":[9]', 1),
    "nesting": lambda data: (200_000).to_bytes(8, "little") + b"{" + b"[" * 199_999,
    "negative offsets": lambda data: data.replace(b'"data_offsets":[0', b'"data_offsets":[9', 1),
}


@pytest.mark.parametrize("damage", [*DAMAGE.values()], ids=[*DAMAGE])
def test_damaged_files_say_so(damage, whole, tmp_path):
    damaged = damage(whole)
    assert damaged != whole
    (tmp_path / "m.flow").write_bytes(damaged)
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        flows.load(tmp_path / "m.flow")


def rewritten(path, change):
    """The file with other metadata, and a checksum that fits them."""
    from safetensors.torch import load_file, save_file

    from flows.training import model_file

    tensors = load_file(path)
    with model_file_metadata(path) as metadata:
        change(metadata)
        metadata["checksum"] = model_file._checksum(metadata, tensors)
    save_file(tensors, path, metadata)


class model_file_metadata:
    def __init__(self, path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            self.metadata = dict(file.metadata())
        self.metadata.pop("checksum")

    def __enter__(self):
        return self.metadata

    def __exit__(self, *error):
        return False


def set_settings(old, new):
    def change(metadata):
        assert old in metadata["settings"]
        metadata["settings"] = metadata["settings"].replace(old, new)

    return change


HOSTILE = {
    "code": (set_settings("flows.fields.MLP", "os.system"), UntrustedConfigError, "os.system"),
    "our reader": (set_settings("flows.fields.MLP", "flows.load"), UntrustedConfigError, "flows.load"),
    "huge": (set_settings("- 8", "- 800000000"), UntrustedConfigError, "asks for|ask for"),
    "larger": (set_settings("- 8", "- 100000"), CheckpointError, "needs a tensor of 6,400,064 numbers"),
    "reference": (set_settings("hidden:\n  - 8", "hidden:\n    _tensor_: nothing"), CheckpointError, "'nothing'"),
    "no yaml": (lambda metadata: metadata.update(settings="a: ["), CheckpointError, "not valid yaml"),
    "no json": (lambda metadata: metadata.update(data="{"), DamagedCheckpointError, "not as flows writes"),
    "no shape": (lambda metadata: metadata.update(data="{}"), CheckpointError, "event_shape"),
    "a list": (lambda metadata: metadata.update(data="[1]"), CheckpointError, "data"),
    "deep": (lambda metadata: metadata.update(data="[" * 100_000), DamagedCheckpointError, "not as flows writes"),
    "dtype": (lambda metadata: metadata.update(dtype="int8"), CheckpointError, "int8"),
    "newer": (lambda metadata: metadata.update(version="9"), CheckpointError, "version 9.*reads version 1; upgrade"),
    "older": (lambda metadata: metadata.update(version="0"), CheckpointError, "with the version that wrote it"),
    "others": (
        lambda metadata: metadata.pop("format"),
        DamagedCheckpointError,
        "nothing says that flows.save wrote it",
    ),
}


@pytest.mark.parametrize(("change", "kind", "words"), [*HOSTILE.values()], ids=[*HOSTILE])
def test_hostile_files_are_refused(change, kind, words, whole, tmp_path):
    path = tmp_path / "m.flow"
    path.write_bytes(whole)
    rewritten(path, lambda metadata: None)
    assert isinstance(flows.load(path), flows.CNF)
    rewritten(path, change)
    with pytest.raises(kind, match=words):
        flows.load(path)


class FakeHub(types.ModuleType):
    """A hub in a folder."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.private = folder, None

    def HfApi(self, token=None):
        return self

    def create_repo(self, repo, private, exist_ok):
        if repo.startswith("taken/"):
            raise ValueError("403 Forbidden\nmore")
        self.private = private
        (self.folder / repo).mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, repo, name):
        return (self.folder / repo / name).exists()

    def upload_folder(self, repo_id, folder_path, commit_message):
        import shutil

        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def hf_hub_download(self, repo, name, revision=None, token=None):
        path = self.folder / repo / name
        if not path.exists():
            raise OSError(f"404 Not Found: {repo}\nmore")
        return str(path)


def test_the_hub(monkeypatch, tmp_path):
    hub = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    flow = conditional().eval()
    assert flow.to_hub("me/people", private=True) == "https://hub/me/people"
    assert hub.private
    card = (tmp_path / "me/people/README.md").read_text()
    assert 'flows.from_hub("me/people")' in card
    assert_same(flow, flows.from_hub("me/people"))
    (tmp_path / "me/people/README.md").write_text("mine")
    flows.to_hub(flow, "me/people")
    assert (tmp_path / "me/people/README.md").read_text() == "mine"
    with pytest.raises(FileError, match=r"cannot be downloaded from 'me/none': 404 Not Found: me/none; name"):
        flows.from_hub("me/none")
    with pytest.raises(FileError, match=r"cannot be uploaded to 'taken/x': 403 Forbidden$"):
        flows.to_hub(flow, "taken/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match="pip install huggingface_hub"):
        flows.from_hub("me/people")


def test_the_arguments_of_a_module_follow_copies(tmp_path):
    import copy
    import pickle

    flow = conditional()
    for one in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert Built.of(one).arguments["field"] is one.field
        assert_same(flow.eval(), loaded(one, tmp_path))


def test_modules_keep_no_data_alive():
    base = bases.Empirical(dataset=flows.datasets.Moons())
    assert "Moons" not in repr(Built.of(base).arguments)
    large = bases.Empirical(points=torch.randn(100_000, 2))
    assert not isinstance(Built.of(large).arguments["points"], torch.Tensor)
    assert json.dumps(str(Built.of(large).arguments))
