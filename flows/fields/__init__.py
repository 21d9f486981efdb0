"""Vector fields v(t, x), several with their divergence in closed form."""

from flows.fields.activations import Activation, Elementwise, Logistic, SiLU, Sine, Softplus, Tanh
from flows.fields.adapter import Adapter
from flows.fields.base import Field, named_field
from flows.fields.concat_squash import ConcatSquashMLP
from flows.fields.conv import ConvNet
from flows.fields.equivariant import EquivariantKernel
from flows.fields.forced import Forced
from flows.fields.guided import Guided
from flows.fields.hollow import Hollow
from flows.fields.linear import Linear
from flows.fields.mlp import MLP
from flows.fields.modulation import Modulation
from flows.fields.multiscale import Multiscale
from flows.fields.periodic_conv import PeriodicConv
from flows.fields.physics import Coefficient, Physics
from flows.fields.planar import Planar
from flows.fields.potential import Potential
from flows.fields.time import SinusoidalTime
from flows.fields.unet import UNet
from flows.vector_field import BoundField, bind

__all__ = [
    "MLP",
    "Activation",
    "Adapter",
    "BoundField",
    "Coefficient",
    "ConcatSquashMLP",
    "ConvNet",
    "Elementwise",
    "EquivariantKernel",
    "Field",
    "Forced",
    "Guided",
    "Hollow",
    "Linear",
    "Logistic",
    "Modulation",
    "Multiscale",
    "PeriodicConv",
    "Physics",
    "Planar",
    "Potential",
    "SiLU",
    "Sine",
    "SinusoidalTime",
    "Softplus",
    "Tanh",
    "UNet",
    "bind",
    "named_field",
]
