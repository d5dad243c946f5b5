"""A run's model as files that other programs load: safetensors, and the layout of Hugging Face.

Decoders become ``LlamaForCausalLM``. A byte-level GPT has RMSNorm where GPT-2 has LayerNorm, so it
becomes a ``GPT2LMHeadModel`` of twice the width whose stream is (x, -x): its mean is 0, so that
LayerNorm of it is RMSNorm of x; weights that read the second half are 0. Same function, bit for bit
but for rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from swarmtrain.training.flat import Flat
from swarmtrain.training.model import BYTES, ByteGPT, Sizes
from swarmtrain.training.presets import PRESETS
from swarmtrain.training.stages.decoder import DECODERS, Decoder, DecoderSizes
from swarmtrain.training.stages.families import cut_model
from swarmtrain.training.stages.runtime import StageRuntime
from swarmtrain_peer.files import FileSystem, make_folders, write_atomic
from swarmtrain_protocols.errors import CheckpointError, ConfigError

F32 = NDArray[np.float32]
EPSILON = 1e-6
"""Of the RMSNorm of both families."""


def preset_model(keys: Mapping[str, Any]) -> ByteGPT | Decoder:
    """The model that the run keys name, with the values of its seed.

    Raises:
        ConfigError: no such preset, or sizes that do not fit together.
    """
    name, sizes = keys["preset"], dict(keys.get("model") or {})
    sizes.pop("boundary_rank", None)
    if name in PRESETS:
        return ByteGPT(Sizes.from_mapping(PRESETS[name], sizes), keys["seed"])
    if name in DECODERS:
        return Decoder(DecoderSizes.from_mapping(DECODERS[name], sizes))
    known = [*PRESETS, *DECODERS]
    raise ConfigError(f"run key preset = {name}", "no such preset", f"one of {known}")


def trained_model(
    keys: Mapping[str, Any], states: Mapping[str, F32], make: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The model of a run with the values of its channels.

    Args:
        states: f32[n] of every channel of the run.
        make: builds the model of a run with its own training script; None: the preset's.

    Raises:
        CheckpointError: a channel is missing, or has another number of values than the model.
    """
    model = preset_model(keys) if make is None else make()
    if keys["stages"] == 0:
        flat = Flat(model, keys["fragments"])
        for channel, count in flat.layout:
            flat.write(channel, _values(states, channel, count))
        return model
    pieces = cut_model(model, keys["stages"])
    stages = range(keys["stages"] + 1)
    # The runtime knows what a stage computes with: a subspace codec projects its weights.
    runtime = StageRuntime.build(keys, stages) if make is None else None
    for stage in stages:
        theta: NDArray[Any] = _values(states, f"train/{stage}/0", pieces.values(stage))
        if runtime is not None:
            runtime.load(stage, theta)
            theta = runtime.theta(stage)
        start = 0
        for parameter in pieces.modules[stage].parameters():
            values = torch.from_numpy(np.array(theta[start : start + parameter.numel()]))
            parameter.data.copy_(values.view(parameter.shape))
            start += parameter.numel()
    return model


def _values(states: Mapping[str, F32], channel: str, count: int) -> F32:
    found = states.get(channel)
    if found is None:
        raise CheckpointError(f"channel {channel}", "this checkpoint does not hold it")
    if found.shape != (count,):
        raise CheckpointError(f"channel {channel}", f"{found.size} values, the model has {count}")
    return found


def write_safetensors(model: nn.Module, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
    """``model.safetensors``: f32 tensors under the model's own names; the files written."""
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return _write(folder, {"model.safetensors": _packed(tensors, metadata)})


def write_hugging_face(model: nn.Module, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Weights, config and a byte tokenizer, as transformers' ``Auto…`` classes load them.

    Raises:
        ConfigError: the model is of no family that transformers knows.
    """
    vocabulary = BYTES
    if isinstance(model, Decoder):
        config, tensors = _llama(model)
        vocabulary = model.sizes.vocabulary
    elif isinstance(model, ByteGPT):
        config, tensors = _gpt2(model)
        vocabulary = model.sizes.vocabulary
    else:
        raise ConfigError(
            f"{type(model).__name__} has no layout in transformers",
            "known: the presets",
            "export --to safetensors and load the tensors by name",
        )
    files = {
        "model.safetensors": _packed(tensors, {"format": "pt", **metadata}),
        "config.json": _json({**config, "torch_dtype": "float32", "use_cache": True}),
        "generation_config.json": _json({"do_sample": False}),
    }
    if vocabulary == BYTES:
        limit = config.get("n_positions") or config["max_position_embeddings"]
        files["tokenizer.json"] = _json(byte_tokenizer())
        files["tokenizer_config.json"] = _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": limit,
                "clean_up_tokenization_spaces": False,
            }
        )
    return _write(folder, files)


def _llama(model: Decoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sizes = model.sizes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.d_model,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": EPSILON,
        "rope_theta": float(sizes.rope_theta),
        "hidden_act": "silu",
        "tie_word_embeddings": bool(sizes.tied),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    tensors = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.gain,
    }
    if not sizes.tied:
        tensors["lm_head.weight"] = model.head.weight
    names = {
        "norm_attention.gain": "input_layernorm.weight",
        "attention.q.weight": "self_attn.q_proj.weight",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.v.weight": "self_attn.v_proj.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "norm_mlp.gain": "post_attention_layernorm.weight",
        "mlp.gate.weight": "mlp.gate_proj.weight",
        "mlp.up.weight": "mlp.up_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    }
    for number, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            tensors[f"model.layers.{number}.{names[name]}"] = parameter
    return config, {name: value.detach().contiguous() for name, value in tensors.items()}


def _gpt2(model: ByteGPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sizes, width = model.sizes, model.sizes.d_model
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": sizes.vocabulary,
        "n_positions": sizes.context,
        "n_embd": 2 * width,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "n_inner": 4 * width,
        "activation_function": "gelu",
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": False,
        "scale_attn_weights": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    tensors = {
        "transformer.wte.weight": _both(model.embed.weight),
        "transformer.wpe.weight": _both(model.positions.weight),
        "transformer.ln_f.weight": _first(model.norm.gain),
        "transformer.ln_f.bias": torch.zeros(2 * width),
        "lm_head.weight": _first(model.head.weight),
    }
    for number, block in enumerate(model.blocks):
        for name, value in _gpt2_block(block, sizes).items():
            tensors[f"transformer.h.{number}.{name}"] = value
    return config, {name: value.detach().contiguous() for name, value in tensors.items()}


def _gpt2_block(block: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    """Heads are twice as wide, their second half 0; GPT-2's matrices are [in, out]."""
    width, heads = sizes.d_model, sizes.heads
    parts = dict(block.named_parameters())
    qkv = parts["qkv.weight"].view(3, heads, width // heads, width)
    wide = torch.zeros(3, heads, 2 * (width // heads), 2 * width)
    wide[:, :, : width // heads, :width] = qkv
    wide[0] *= math.sqrt(2)  # heads that are twice as wide divide by more
    out = torch.zeros(heads, 2 * (width // heads), 2 * width)
    out[:, : width // heads] = _both(parts["out.weight"].T).view(heads, width // heads, -1)
    return {
        "ln_1.weight": _first(parts["norm_attention.gain"]),
        "ln_1.bias": torch.zeros(2 * width),
        "attn.c_attn.weight": wide.view(6 * width, 2 * width).T,
        "attn.c_attn.bias": torch.zeros(6 * width),
        "attn.c_proj.weight": out.view(2 * width, 2 * width),
        "attn.c_proj.bias": torch.zeros(2 * width),
        "ln_2.weight": _first(parts["norm_mlp.gain"]),
        "ln_2.bias": torch.zeros(2 * width),
        "mlp.c_fc.weight": _first(parts["up.weight"]).T,
        "mlp.c_fc.bias": torch.zeros(4 * width),
        "mlp.c_proj.weight": _both(parts["down.weight"].T),
        "mlp.c_proj.bias": torch.zeros(2 * width),
    }


def _both(x: Tensor) -> Tensor:
    """(x, -x) along the last axis: what is written into the stream."""
    return torch.cat((x, -x), dim=-1)


def _first(x: Tensor) -> Tensor:
    """(x, 0) along the last axis: what reads from the stream."""
    return torch.cat((x, torch.zeros_like(x)), dim=-1)


def byte_tokenizer() -> dict[str, Any]:
    """``tokenizer.json`` of the tokenizers library in which token i is byte i.

    Bytes are written as in GPT-2: printable Latin-1 as itself, the others as U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(BYTES + number) for number, byte in enumerate(others)}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**plain, "use_regex": False},
        "post_processor": None,
        "decoder": {**plain, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {names[byte]: byte for byte in range(BYTES)},
            "merges": [],
        },
    }


def _packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # Tied tensors share memory, which the format does not have: each is written out.
    return save({name: value.clone() for name, value in tensors.items()}, dict(metadata))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    system = FileSystem()
    make_folders(system, folder)
    for name, data in files.items():
        write_atomic(system, folder / name, [data])
    return [folder / name for name in files]
