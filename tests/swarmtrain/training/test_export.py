"""Exported models, read by transformers and safetensors, answer what ours answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from swarmtrain.training.export import (
    byte_tokenizer,
    preset_model,
    trained_model,
    write_hugging_face,
    write_safetensors,
)
from swarmtrain.training.flat import Flat
from swarmtrain.training.stages.families import cut_model
from swarmtrain_protocols.errors import CheckpointError, ConfigError
from swarmtrain_protocols.manifest import RunKeys

TEXT = "Hello, wörld\n\t\x00 and   more"


def keys_of(**given: Any) -> dict[str, Any]:
    return msgspec.structs.asdict(RunKeys(name="export", **given))


def shaken(model: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model tells in its logits."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("lm-tiny", {}),
        ("lm-tiny", {"heads": 2, "layers": 3, "d_model": 48}),
        ("decoder-tiny", {"kv_heads": 2}),
        ("decoder-tiny", {"tied": 1, "layers": 2}),
    ],
)
def test_transformers_computes_the_same_logits(
    tmp_path: Path, preset: str, sizes: dict[str, int]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = shaken(preset_model(keys_of(preset=preset, model=sizes)))
    write_hugging_face(model, tmp_path, {"run": "ab"})
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids[0].tolist() == list(TEXT.encode())
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        ours, theirs = model(ids), other(ids).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize("fragments", [1, 2])
def test_the_channels_of_a_run_fill_its_model(fragments: int) -> None:
    keys = keys_of(preset="lm-tiny", fragments=fragments)
    trained = shaken(preset_model(keys))
    flat = Flat(trained, fragments)
    states = {name: np.empty(count, np.float32) for name, count in flat.layout}
    for name, values in states.items():
        flat.read(name, values)
    found = trained_model(keys, states).state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(found[name], value)
    with pytest.raises(CheckpointError, match="does not hold it"):
        trained_model(keys, dict(list(states.items())[1:]))
    short = {name: values[:-1] for name, values in states.items()}
    with pytest.raises(CheckpointError, match="values, the model has"):
        trained_model(keys, short)


def test_the_stages_of_a_pipeline_fill_its_model() -> None:
    keys = keys_of(preset="decoder-tiny", stages=2)
    trained = shaken(preset_model(keys))
    pieces = cut_model(trained, 2)
    states = {
        f"train/{stage}/0": torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()
        for stage, module in enumerate(pieces.modules)
    }
    found = trained_model(keys, states).state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(found[name], value)


def test_a_model_of_ones_own_is_named_by_its_maker(tmp_path: Path) -> None:
    keys = keys_of()
    values = np.arange(6, dtype=np.float32)
    found = trained_model(keys, {"train/0/0": values}, lambda: nn.Linear(2, 2))
    (path,) = write_safetensors(found, tmp_path / "out", {"run": "ab"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"run": "ab"}
        assert file.get_tensor("weight").tolist() == [[0, 1], [2, 3]]
        assert file.get_tensor("bias").tolist() == [4, 5]
    with pytest.raises(ConfigError, match="no layout in transformers"):
        write_hugging_face(found, tmp_path / "hf", {})


def test_every_byte_is_its_own_token() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(byte_tokenizer()))
    assert tokenizer.get_vocab_size() == 256
    every = "".join(map(chr, range(0x250)))
    assert tokenizer.encode(every).ids == list(every.encode())


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such preset"):
        preset_model({**keys_of(), "preset": "lm-giant"})
