"""Data sets: densities (in the plane, conditional, of particles, on lattices), pictures as densities, and tables."""

from flows.datasets.base import Batch, BatchStream, Dataset, one_hot
from flows.datasets.conditional import ConditionalDensity, GaussianMean, MoonsByClass
from flows.datasets.curves import Moons, Pinwheel, SwissRoll, TwoSpirals
from flows.datasets.density import Density
from flows.datasets.image_density import ImageDensity
from flows.datasets.lattice import FreeField
from flows.datasets.particles import Particles
from flows.datasets.tabular import BreastCancer, Table, Tabular
from flows.datasets.toy import Checkerboard, Circles, EightGaussians, Gaussian, Rings

__all__ = [
    "Batch",
    "BatchStream",
    "BreastCancer",
    "Checkerboard",
    "Circles",
    "ConditionalDensity",
    "Dataset",
    "Density",
    "EightGaussians",
    "FreeField",
    "Gaussian",
    "GaussianMean",
    "ImageDensity",
    "Moons",
    "MoonsByClass",
    "Particles",
    "Pinwheel",
    "Rings",
    "SwissRoll",
    "Table",
    "Tabular",
    "TwoSpirals",
    "one_hot",
]
