"""The density of a table, with error bars: python examples/density_of_a_table.py [table.csv]"""

import sys

import torch

import flows

STEPS = 300

if len(sys.argv) > 1:
    data = flows.datasets.Tabular(sys.argv[1])
else:
    data = flows.datasets.BreastCancer(columns=["mean radius", "mean texture", "mean smoothness"])

transform = flows.transforms.Standardise(data.event_shape).fit(data.reference())
flow = flows.CNF(flows.fields.MLP(data.event_shape), transform=transform)
reporting = flows.training.Reporting(plot_every=None)
stage = flows.training.Stage(flows.objectives.FlowMatching(), steps=STEPS, batch_size=256)
summary = flows.Trainer(flow, data, {"flow_matching": stage}, reporting=reporting).fit()
print(f"NLL {summary.metrics['nll']:.3f} ± {summary.metrics['nll_se']:.3f} nats on {len(data.held_out('test').x)} rows")

with torch.no_grad():
    estimate = flow.estimate_log_prob(data.held_out("test").x[:5])
for value, error in zip(estimate.value, estimate.solver_error, strict=True):
    print(f"log p = {float(value):.3f}, solver error {float(error):.0e}")
