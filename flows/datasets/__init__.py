"""Data sets: densities, energies, images, tables and time series."""

from flows.datasets.base import Dataset, one_hot
from flows.datasets.batches import Batch, BatchStream
from flows.datasets.densities.conditional import ConditionalDensity, GaussianMean, MoonsByClass
from flows.datasets.densities.curves import Moons, Pinwheel, SwissRoll, TwoSpirals
from flows.datasets.densities.density import Density
from flows.datasets.densities.energies import DoubleWell, Energy, Funnel, NoData
from flows.datasets.densities.image_density import ImageDensity
from flows.datasets.densities.lattice import FreeField, Phi4
from flows.datasets.densities.particles import Particles
from flows.datasets.densities.toy import Checkerboard, Circles, EightGaussians, Gaussian, Rings
from flows.datasets.images.files import ImageFiles
from flows.datasets.images.images import Digits, Images, LabelledImages
from flows.datasets.images.photos import PhotoPatches
from flows.datasets.images.streamed import StreamedImages
from flows.datasets.series.batches import SeriesBatch
from flows.datasets.series.dynamical_system import DynamicalSystem
from flows.datasets.series.series import Series
from flows.datasets.series.systems import Lorenz, LotkaVolterra, Oscillator, Pendulum, Spiral, TwoBody
from flows.datasets.series.trajectories import Trajectories
from flows.datasets.simulators.benchmark import (
    SIR,
    SLCP,
    BenchmarkSimulator,
    BernoulliGLM,
    GaussianMixturePosterior,
    LotkaVolterraPosterior,
    TwoMoons,
)
from flows.datasets.simulators.priors import Prior, box
from flows.datasets.simulators.simulations import Simulations
from flows.datasets.simulators.simulator import Simulator
from flows.datasets.tables.bundled import BreastCancer, Diabetes
from flows.datasets.tables.large import LargeTable
from flows.datasets.tables.tabular import Table, Tabular
from flows.datasets.tables.uci import UCIRegression

HubImages = ImageFiles  # its name in runs from before 0.2

__all__ = [
    "SIR",
    "SLCP",
    "Batch",
    "BatchStream",
    "BenchmarkSimulator",
    "BernoulliGLM",
    "BreastCancer",
    "Checkerboard",
    "Circles",
    "ConditionalDensity",
    "Dataset",
    "Density",
    "Diabetes",
    "Digits",
    "DoubleWell",
    "DynamicalSystem",
    "EightGaussians",
    "Energy",
    "FreeField",
    "Funnel",
    "Gaussian",
    "GaussianMean",
    "GaussianMixturePosterior",
    "HubImages",
    "ImageDensity",
    "ImageFiles",
    "Images",
    "LabelledImages",
    "LargeTable",
    "Lorenz",
    "LotkaVolterra",
    "LotkaVolterraPosterior",
    "Moons",
    "MoonsByClass",
    "NoData",
    "Oscillator",
    "Particles",
    "Pendulum",
    "Phi4",
    "PhotoPatches",
    "Pinwheel",
    "Prior",
    "Rings",
    "Series",
    "SeriesBatch",
    "Simulations",
    "Simulator",
    "Spiral",
    "StreamedImages",
    "SwissRoll",
    "Table",
    "Tabular",
    "Trajectories",
    "TwoBody",
    "TwoMoons",
    "TwoSpirals",
    "UCIRegression",
    "box",
    "one_hot",
]
