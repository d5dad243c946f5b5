"""Your own model on a data set of Hugging Face, each sample once an epoch, whoever comes and goes.

python examples/own_dataset.py FOLDER              alone, on a folder that `save_to_disk` wrote
python examples/own_dataset.py NAME --found        the first of a swarm, on a data set of the hub
swarmtrain join TICKET -- python examples/own_dataset.py NAME
"""

import sys
from pathlib import Path

import datasets
import torch
from torch import nn

import swarmtrain as st

CONTEXT = 64
name = sys.argv[1]
run = {"name": "rows", "shards": 64, "inner_steps": 20, "batch_size": 8}

rows = datasets.load_from_disk(name) if Path(name).is_dir() else None
rows = datasets.load_dataset(name, split="train") if rows is None else rows


def collate(batch: list[dict[str, str]]) -> torch.Tensor:
    """The first bytes of each row, padded with zeros: int64 [batch, CONTEXT + 1]."""
    texts = [row["text"].encode()[: CONTEXT + 1].ljust(CONTEXT + 1, b"\0") for row in batch]
    return torch.tensor([list(text) for text in texts])


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collate)

with st.join(model, optimizer, run=run if "--found" in sys.argv else None) as swarm:
    # Dealt by the run's log; a data set that can only be read in order: swarm.data(..., rows=N).
    for step, ids in enumerate(swarm.data(loader, name=name)):
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        swarm.log(loss=loss.item())
        if "--steps" in sys.argv and step + 1 >= int(sys.argv[sys.argv.index("--steps") + 1]):
            break
    print(f"step {swarm.state.step}, round {swarm.state.round}, loss {loss.item():.3f}")
