"""The preset model learns, its θ⁰ is the same everywhere, and its schedule is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from swarmtrain.training.data import load_corpus
from swarmtrain.training.model import BYTES, ByteGPT, Sizes, loss_of
from swarmtrain.training.presets import PRESETS, build, evaluate
from swarmtrain.training.stages.decoder import DECODERS
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.pipeline.generation import TextModel, text_model
from swarmtrain_protocols.stageopt import lr_factor

CPU = torch.device("cpu")


def keys(**changes):
    found = RunKeys(**changes)
    return {name: getattr(found, name) for name in RunKeys.__struct_fields__}


def test_the_default_model_has_the_size_of_the_reference():
    model = ByteGPT(PRESETS["lm-tiny"], seed=1)
    assert sum(p.numel() for p in model.parameters()) == 135_488
    # From nothing it knows nothing: the loss of a uniform guess.
    tokens = torch.arange(64).view(1, 64)
    assert abs(loss_of(model, tokens, tokens).item() - math.log(256)) < 0.1


def test_theta0_is_a_function_of_the_seed():
    torch.manual_seed(99)  # and of nothing else
    one, two = ByteGPT(Sizes(), 5), ByteGPT(Sizes(), 5)
    other = ByteGPT(Sizes(), 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_no_token_sees_the_future():
    model = ByteGPT(Sizes(d_model=16, heads=2, context=8), 0)
    tokens = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 5:] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_schedule():
    assert lr_factor(0, 0, 4, 0) == 0.25 and lr_factor(3, 3, 4, 0) == 1.0
    assert lr_factor(99, 99, 4, 0) == 1.0, "no planned end, no decay"
    assert lr_factor(4, 4, 4, 104) == 1.0
    assert lr_factor(54, 54, 4, 104) == pytest.approx(0.55)
    assert lr_factor(104, 104, 4, 104) == pytest.approx(0.1)
    assert lr_factor(999, 999, 4, 104) == pytest.approx(0.1)
    # A newcomer in the middle of the decay warms up to where the run is.
    assert lr_factor(1, 54, 4, 104) == pytest.approx(0.275)


def test_it_learns_within_a_few_steps():
    torch.set_num_threads(1)
    preset = build(keys(inner_lr=1e-2, inner_warmup_steps=5), CPU)
    corpus = load_corpus("stdlib")
    held_out = [torch.from_numpy(a) for a in corpus.evaluation(16, preset.context)]
    before = evaluate(preset.model, *held_out)
    for step in range(25):
        preset.set_lr(step, step)
        batch = [torch.from_numpy(a) for a in corpus.batch(0, step, 4, preset.context)]
        torch.autograd.backward(preset.loss(*batch))
        torch.nn.utils.clip_grad_norm_(preset.model.parameters(), preset.clip)
        preset.optimizer.step()
        preset.optimizer.zero_grad()
    after = evaluate(preset.model, *held_out)
    assert before > 5.4 and after < 3.6
    whole = loss_of(preset.model, *held_out).item()
    assert after == pytest.approx(whole, rel=1e-5), "pieces of 32 windows weigh by tokens"


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "nope"},
        {"model": {"width": 3}},
        {"model": {"heads": 3}},
        {"model": {"layers": 0}},
    ],
)
def test_unknown_presets_and_sizes_are_refused(changes):
    with pytest.raises(ConfigError):
        build(keys(**changes), CPU)


def test_optimizers():
    sgd = build(keys(inner_optimizer="sgd"), CPU).optimizer
    assert isinstance(sgd, torch.optim.SGD)
    adamw = build(keys(), CPU).optimizer
    assert isinstance(adamw, torch.optim.AdamW)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert all(p.dim() <= 1 for p in adamw.param_groups[1]["params"])


def test_processes_without_torch_know_what_presets_read() -> None:
    for name, sizes in PRESETS.items():
        assert text_model(name, {}) == TextModel(sizes.context, BYTES)
    for name, decoder in DECODERS.items():
        assert text_model(name, {}) == TextModel(decoder.context, decoder.vocabulary)


def test_what_the_run_changes_in_flight_is_followed():
    preset = build(keys(), CPU)
    preset.follow(InnerStep(20, 0.5, 0.25, 2.0, 0, 0, 2.0))
    preset.set_lr(10, 10)
    assert [group["lr"] for group in preset.optimizer.param_groups] == [0.5, 0.5]
    decays = [group["weight_decay"] for group in preset.optimizer.param_groups]
    assert decays == [0.25, 0.0] and preset.clip == 2.0, "vectors do not decay"
    plain = build(keys(inner_optimizer="sgd"), CPU)
    plain.follow(InnerStep(20, 0.5, 0.25, 2.0, 0, 0, 2.0))
    assert [group["weight_decay"] for group in plain.optimizer.param_groups] == [0]
