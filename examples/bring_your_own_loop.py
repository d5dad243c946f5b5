"""Your own model and loop, in a swarm by three lines; alone it simply trains.

python examples/bring_your_own_loop.py                     alone
swarmtrain join TICKET -- python examples/bring_your_own_loop.py
"""

import sys

import torch
from torch import nn

import swarmtrain as st

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
run = {"name": "spirals", "inner_steps": 10} if "--found" in sys.argv else None

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def spirals(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(0, 2, (n,))
    radius = torch.rand(n)
    angle = 9 * radius + torch.pi * label
    points = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    return points + 0.02 * torch.randn(n, 2), label


with st.join(model, optimizer, run=run) as swarm:  # 1
    for points, label in swarm.data(spirals(64) for _ in range(steps)):  # 2
        loss = nn.functional.cross_entropy(model(points), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        swarm.log(loss=loss.item())  # 3, optional
    print(f"step {swarm.state.step}, round {swarm.state.round}, loss {loss.item():.3f}")
