"""What a field must promise, and the examination of fields that are not of this package.

A solve supposes that a field is one function of `(t, x, context)`: it leaves its arguments alone, returns the same
value each time, treats the samples of a batch apart, and has the derivatives that autograd finds. Fields of this
package keep these promises by construction. Any other field is examined at its first use: `values` looks at its
values, `derivatives` at its derivatives, and `captured` finds the tensors that it uses without stating them. What can
be healed is written to the field's `Traits`, which every evaluation follows; the rest is an error that names the
promise.
"""

from flows.promises.captured import captured_tensors, copyable
from flows.promises.derivatives import examine_derivatives
from flows.promises.evaluation import Evaluation
from flows.promises.failures import explained, raise_explained, without_gradients
from flows.promises.traits import Traits, traits_of
from flows.promises.values import examine_values

__all__ = [
    "Evaluation",
    "Traits",
    "captured_tensors",
    "copyable",
    "examine_derivatives",
    "examine_values",
    "explained",
    "raise_explained",
    "traits_of",
    "without_gradients",
]
