"""Prints ``docs/configuration.md``: every key, its default, what is allowed, what it means.

``python -m swarmtrain_peer.config_page``; a test compares the page with this.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from swarmtrain_peer.config import PEER_KEYS, RUN_KEYS, PeerConfig
from swarmtrain_protocols.manifest import RunKeys, allowed_values

RUN_TEXTS = {
    "run.name": "What people call the run.",
    "run.seed": "Of weights and data.",
    "run.max_rounds": "Commits (rounds, or steps of a pipeline) after which the run ends; 0: until "
    "stopped.",
    "run.min_peers": "Contributors without whom no round opens.",
    "run.start_peers": "Contributors that the first round, or workers that the first assignment of "
    "stages, waits for; later there may be fewer.",
    "run.stewards": "Members that vote in the log, as far as so many may; 0: one, three from three "
    "that may, five from eight, seven from fourteen.",
    "train.preset": "The model: lm-tiny, lm-small, lm-base, or for pipelines also one of the "
    "decoders; `own` for a pipeline whose scripts bring it.",
    "train.model": "Sizes that differ from the preset's: a table such as `{ layers = 6, d_model = "
    "64 }`.",
    "train.corpus": "`stdlib`; `path:FOLDER` of text, `.jsonl` or `.parquet`; `tokens:FOLDER` of "
    "`.npy` files; `hf:NAME`, a data set of Hugging Face. Options behind a `?`: `text=FIELD`, "
    "`split=train`, `config=…`, `rows=N`, `streaming=1`, `tokenizer=FILE` (spec 12, §1.3).",
    "train.corpus_hash": "Hash of the corpus in hex; empty: that of the founder's copy is pinned.",
    "train.shards": "Shards in which an epoch of the data is dealt to members, each sample once; "
    "0: windows of text are drawn without end.",
    "train.batch_size": "Sequences in a batch, or in a micro-batch of a pipeline.",
    "train.inner_steps": "Steps between two hand-overs; from 8 on slow members do fewer and fast "
    "ones more, so that all are done at the same time; without meaning in a pipeline that is "
    "`sync`.",
    "train.inner_optimizer": "What trainers step with; in a pipeline what stages step with.",
    "train.inner_lr": "Its learning rate.",
    "train.inner_weight_decay": "Its weight decay; not of vectors.",
    "train.inner_clip": "Largest gradient norm; in a pipeline over all stages; 0: no clipping.",
    "train.inner_warmup_steps": "Steps in which the learning rate rises.",
    "train.total_steps": "Steps of each of `run.start_peers` members over which it then falls, by "
    "the samples that all have contributed; 0: it does not.",
    "train.outer_lr": "Of the outer step; auto: by overlap, members and planned rounds.",
    "train.outer_momentum": "Of the outer step.",
    "train.overlap": "Whether rounds hide behind the next inner steps.",
    "train.fragments": "Parts of the model that are shared in turn; 1 in a pipeline.",
    "train.delay": "Inner steps between a fragment's boundary and the use of its result.",
    "train.mix": "Share of the own weights in that mix.",
    "train.max_base_age_rounds": "How old the base of a contribution may be.",
    "train.max_extra_steps_factor": "Inner steps while a round is undecided, as a multiple of "
    "`inner_steps`; then trainers wait.",
    "comm.codec": "Both of the next two.",
    "comm.codec_scatter": "Of contributions (in a pipeline: gradients of stages).",
    "comm.codec_gather": "Of results.",
    "comm.grace_s": "Seconds the leader waits for late contributions; 0: from measured rates.",
    "comm.round_timeout_s": "Seconds an attempt, or a step of a pipeline, may take; 0: from "
    "measured times.",
    "checkpoint.every_rounds": "Commits between two checkpoints on disk.",
    "pipeline.stages": "Groups of equally many blocks that the model is cut into; 0: no pipeline, "
    "and the keys below mean nothing. It must divide the number of layers.",
    "pipeline.micro_batches": "Micro-batches of `train.batch_size` sequences in one step.",
    "pipeline.mode": "`sync`: all stages step together, with one outcome in the log. `diloco`: "
    "each member steps its stages by itself and meets the others every `train.inner_steps`; needs "
    "`overlap` `off` or `auto`.",
    "pipeline.codec": "Of activations and their gradients between stages.",
    "pipeline.replicas_min": "Members below which a stage counts as endangered; joiners go there "
    "first, and nobody is moved away below it.",
    "pipeline.ends_replicas": "Members that serve embedding and head, as far as there are enough; "
    "at least `replicas_min`.",
    "pipeline.close_fraction": "Share of the micro-batches with which a step that is late may "
    "close.",
    "pipeline.swapped": "Every other micro-batch takes the first two and the last two stages the "
    "other way round, so that these can recover by copy (CheckFree+); 4 stages or more.",
    "pipeline.skip_fraction": "Share of micro-batches that may leave out an inner stage that is "
    "overloaded.",
    "pipeline.generate_share": "Share of a worker's time that `swarmtrain generate` may take.",
}
PEER_TEXTS = {
    "peer.name": "What others see; empty: the machine's name.",
    "peer.trains": "Train on this machine.",
    "peer.holds_state": "Keep the model, or in a pipeline the stages it serves.",
    "peer.votes": "Ask to become a steward, if the ticket grants it.",
    "peer.device": "auto, cpu, cuda, cuda:1, mps.",
    "peer.leave_grace_s": "How long a polite leave may wait for the round to end.",
    "peer.hours": "When the site works, local time: `22:00-06:00`, or several windows with commas; "
    "empty: always. Outside it leaves after the round, and comes back by itself.",
    "net.listen": "host:port; port 0: any free one; empty: outgoing links only.",
    "net.announce": "Addresses to tell others instead of those found by looking.",
    "net.up": "Upload cap such as `50Mbit`; auto: none.",
    "net.down": "Download cap.",
    "net.data_cap": "Bytes of all links, both ways, such as `50GB/month`, `10GB/week` or "
    "`2GB/day`; empty: any number. When it is used up the site rests until the next period.",
    "net.donor_share": (
        "Of the measured uplink (or of `net.up`), for members that fetch the state, old results or "
        "the corpus from here; a quarter of that while a round's bytes are on their way."
    ),
    "net.relay": (
        "Carry streams between members that cannot dial each other (`auto`: if this machine does "
        "not train); `no`: nor have its own links carried."
    ),
    "net.port_mapping": (
        "Ask the router for a port (PCP, NAT-PMP, UPnP) where others cannot dial this machine."
    ),
    "dashboard.bind": "host:port of the dashboard; empty: none.",
    "log.level": "debug, info, warning or error: the least that a command writes as a JSON log.",
    "log.format": "text; json: what commands write to standard error is one record a line "
    "(docs/json.md).",
    "log.tensorboard": "Folder for event files of TensorBoard; empty: none.",
    "log.wandb": "Project of Weights & Biases; empty: none. `WANDB_*` is read as it is.",
}
HEAD = """\
# Configuration

`swarmtrain up run.toml` founds a run with the keys of a TOML file; `swarmtrain join --config
peer.toml` gives this machine's own. Order of force: flag, environment
(`SWARMTRAIN_PIPELINE__STAGES` is `pipeline.stages`), file, default. `swarmtrain config show
run.toml --origin` prints where each value came from, and `swarmtrain config check run.toml` says
whether a run can be founded with it. A key that does not exist is an error that names the nearest
one that does; values out of range name the key and what is allowed.

This page is printed by `python -m swarmtrain_peer.config_page`; a test compares them.

A pipeline, for example ([examples/pipeline.toml](../examples/pipeline.toml)):

```toml
[run]
name = "four-stages"
start_peers = 8          # begin when so many workers are there

[train]
preset = "lm-small"
model = { layers = 8 }   # two blocks in each stage

[pipeline]
stages = 4
micro_batches = 16
replicas_min = 2
```
"""


def _toml(value: object) -> str:
    """A default as it would be written in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return '"auto"'
    if isinstance(value, bytes):
        return f'"{value.hex()}"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{}"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if value else "0"


def _plain(text: str) -> str:
    """Large numbers as people write them."""
    words = {"9.0072e+15": "2^53", "1.04858e+06": "2^20", "1e+06": "1000000"}
    for long, short in words.items():
        text = text.replace(long, short)
    return text


def _default(struct: type[msgspec.Struct], field: str) -> Any:
    info = next(one for one in msgspec.structs.fields(struct) if one.name == field)
    made = info.default_factory
    return made() if callable(made) else info.default


def page() -> str:
    """The whole page."""
    lines = [
        HEAD,
        "## Run keys",
        "",
        "Equal on every peer, and hashed into the run's name. Who joins gets them with the run.",
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for key, fields in RUN_KEYS.items():
        default = _toml(_default(RunKeys, fields[0]))
        allowed = _plain(allowed_values(fields[0]))
        lines.append(f"| `{key}` | `{default}` | {allowed} | {RUN_TEXTS[key]} |")
    lines += [
        "",
        "## Peer keys",
        "",
        "This machine's own business.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    for key, field in PEER_KEYS.items():
        default = _toml(_default(PeerConfig, field))
        if field.endswith("_bytes_per_s"):
            default = '"auto"'
        lines.append(f"| `{key}` | `{default}` | {PEER_TEXTS[key]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
