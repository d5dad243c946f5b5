"""Decoders of Hugging Face transformers cut into stages, against the same models whole.

``python benchmarks/cuts.py`` builds small decoders of many families with random weights (nothing is
downloaded), cuts each into two stages and sends one batch through the pieces as encoded bytes.
Prints the largest difference of any gradient relative to the largest gradient of its stage, and
what is refused, with the reason. Exits with 1 if a difference is above 1e-5 or fewer than eight
families can be cut. Needs transformers, which comes with the extra ``test``. Writes
JSON into ``results/``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from local_training import write_result
from torch import nn

from swarmtrain.training.stages.families import cut_model
from swarmtrain.training.stages.reference import LocalPipeline
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_protocols.errors import ConfigError

DIFFERENCE_MAX = 1e-5
FAMILIES_MIN = 8
STAGES, VOCABULARY, CONTEXT = 2, 64, 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", SIZES),
    ("mistral", {**SIZES, "sliding_window": None}),
    ("qwen2", SIZES),
    ("qwen3", SIZES),
    ("gemma", SIZES),
    ("phi3", SIZES),
    ("olmo2", SIZES),
    ("granite", SIZES),
    ("smollm3", {**SIZES, "use_sliding_window": False}),
    ("glm4", SIZES),
    ("gpt2", {**GPT2, **NO_DROPOUT}),
    ("gpt2", GPT2),
    ("gemma3_text", SIZES),
    ("gpt_neox", SIZES),
    ("opt", SIZES),
)


def difference(model: nn.Module) -> float:
    """The largest difference of a gradient in stages, relative to the largest of its stage."""
    cut = cut_model(model, STAGES)
    stages = range(STAGES + 1)
    runtime = StageRuntime(cut, stages, codec="fp32", batch_max=3, seed=0)
    pipeline = LocalPipeline({stage: [runtime] for stage in stages}, STAGES)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 33)).astype(np.int32)
    pipeline.micro_batch(0, ids)
    given = torch.from_numpy(ids.astype(np.int64))
    logits = model(given[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten()).backward()
    worst = 0.0
    for stage, module in enumerate(cut.modules):
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        expected = torch.cat([g.reshape(-1) for g in own]).numpy()
        gap = np.abs(pipeline.gradients(stage) - expected).max()
        worst = max(worst, float(gap / np.abs(expected).max()))
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Try every case, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    import transformers

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for family, sizes in CASES:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        row: dict[str, Any] = {"family": family}
        try:
            row["difference"] = difference(model)
            print(f"{family:14} {row['difference']:.1e}", flush=True)
        except ConfigError as error:
            row["refused"] = str(error)
            print(f"{family:14} refused: {error}", flush=True)
        rows.append(row)
    done = [row["difference"] for row in rows if "difference" in row]
    document = {
        "what": "largest gradient difference of a model in two stages against the model whole",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "rows": rows,
    }
    write_result("cuts", document, options.output)
    return 0 if len(done) >= FAMILIES_MIN and max(done) <= DIFFERENCE_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
