"""The divergence of any function, exactly and by probes: python examples/divergence_of_a_function.py"""

import torch

from flows.divergence import Exact, Hutchinson, HutchPlusPlus, XTrace, check_estimator, divergence

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 20)).double()
x = torch.randn(500, 20, dtype=torch.float64)

with torch.no_grad():
    exact = divergence(net, x, estimator=Exact())
    for estimator in (Hutchinson(num_probes=6), HutchPlusPlus(num_products=6), XTrace(num_products=6)):
        error = (divergence(net, x, estimator=estimator) - exact).square().mean().sqrt()
        print(f"{type(estimator).__name__:14} root mean square error {float(error):.3f}")

for check in check_estimator(Hutchinson(num_probes=2), event_shapes=[(3,)], draws=2000):
    print(check)
