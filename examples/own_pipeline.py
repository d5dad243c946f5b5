"""A pipeline with your own model and tokens: peers serve stages of it, whoever dies on the way.

python examples/own_pipeline.py --found                       founds a run, prints a ticket
swarmtrain join TICKET -- python examples/own_pipeline.py     on every other machine
"""

import sys

import torch
from torch import nn

import swarmtrain as st

WIDTH, CONTEXT, VOCABULARY = 32, 24, 16
KEYS = {"name": "counting", "stages": 2, "micro_batches": 8, "max_rounds": 40, "replicas_min": 1}


class Block(nn.Module):
    """Every token looks at the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, 64)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.down(nn.functional.gelu(self.up(torch.cat((self.norm(x), mean), -1))))


def counting(number: int) -> torch.Tensor:
    stride = 1 + number // VOCABULARY % 3  # negative numbers are the held-out set
    return (number + stride * torch.arange(CONTEXT + 1)) % VOCABULARY


torch.set_num_threads(1)  # blocks of this size are faster so, and the peer process needs room
blocks = [Block() for _ in range(4)]
model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))
st.serve(model, context=CONTEXT, data=counting, run=KEYS if "--found" in sys.argv else None)
