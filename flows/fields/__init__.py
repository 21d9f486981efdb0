"""Vector fields v(t, x), several with their divergence in closed form."""

from flows.fields.activations import Activation, Elementwise, SiLU, Sine, Softplus, Tanh
from flows.fields.adapter import Adapter
from flows.fields.base import BoundField, Field, bind
from flows.fields.concat_squash import ConcatSquashMLP
from flows.fields.linear import Linear
from flows.fields.mlp import MLP
from flows.fields.time import SinusoidalTime

__all__ = [
    "MLP",
    "Activation",
    "Adapter",
    "BoundField",
    "ConcatSquashMLP",
    "Elementwise",
    "Field",
    "Linear",
    "SiLU",
    "Sine",
    "SinusoidalTime",
    "Softplus",
    "Tanh",
    "bind",
]
