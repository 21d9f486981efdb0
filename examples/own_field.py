"""A network of one's own as the field of a flow: python examples/own_field.py"""

import torch

import flows

STEPS = 1000


class Velocity(torch.nn.Module):
    """Any module with `forward(t, x)` will do."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()
        self.network = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, t, x):
        time = t.expand(len(x), 1) if t.ndim == 0 else t.view(-1, 1)
        return self.network(torch.cat([x, time], 1))


torch.manual_seed(0)
data = flows.datasets.Moons()
flow = flows.CNF(Velocity(), event_shape=(2,))
objective = flows.objectives.FlowMatching()
optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)
stream = data.train_stream(512, generator)
for _ in range(STEPS):
    optimizer.zero_grad()
    objective(flow, stream.next(), generator).loss.backward()
    optimizer.step()
with torch.no_grad():
    nll = -flow.log_prob(data.sample(2000, generator)).mean()
print(f"NLL {float(nll):.3f} nats; no model comes below {data.entropy:.3f}")
