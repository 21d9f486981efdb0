"""Data sets: densities, energies, images, tables and time series."""

from flows.datasets.base import Dataset, one_hot
from flows.datasets.batches import Batch, BatchStream
from flows.datasets.benchmark_simulators import (
    SIR,
    SLCP,
    BenchmarkSimulator,
    BernoulliGLM,
    GaussianMixturePosterior,
    LotkaVolterraPosterior,
    TwoMoons,
)
from flows.datasets.conditional import ConditionalDensity, GaussianMean, MoonsByClass
from flows.datasets.curves import Moons, Pinwheel, SwissRoll, TwoSpirals
from flows.datasets.density import Density
from flows.datasets.energies import DoubleWell, Energy, Funnel, NoData
from flows.datasets.image_density import ImageDensity
from flows.datasets.image_files import ImageFiles
from flows.datasets.images import Digits, Images, LabelledImages
from flows.datasets.large_table import LargeTable
from flows.datasets.lattice import FreeField, Phi4
from flows.datasets.particles import Particles
from flows.datasets.photos import PhotoPatches
from flows.datasets.priors import Prior, box
from flows.datasets.series import Series
from flows.datasets.series_batches import SeriesBatch
from flows.datasets.simulations import Simulations
from flows.datasets.simulator import Simulator
from flows.datasets.streamed_images import StreamedImages
from flows.datasets.systems import DynamicalSystem, Lorenz, LotkaVolterra, Oscillator, Pendulum, Spiral, TwoBody
from flows.datasets.tabular import BreastCancer, Diabetes, Table, Tabular
from flows.datasets.toy import Checkerboard, Circles, EightGaussians, Gaussian, Rings
from flows.datasets.trajectories import Trajectories
from flows.datasets.uci import UCIRegression

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
