"""The preset trainer: ``python -m swarmtrain.training.trainer SITE_DIR``.

Trains what the run's manifest names (model, data, schedule), attached to the peer process that
serves the site. It evaluates θ on the held-out set when told, and ends when the run does, after
``--steps`` steps, or on SIGTERM or SIGINT. Errors are three lines on standard error and the error's
exit code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from swarmtrain.training.data import I64, Corpus, announce_corpus, obtain_corpus, position_of
from swarmtrain.training.dealing import Dealer, data_digest
from swarmtrain.training.place import await_peer, await_run_keys
from swarmtrain.training.port import Control, Document
from swarmtrain.training.presets import Preset, build, evaluate
from swarmtrain.training.speaker import Judge, Speaker
from swarmtrain.training.stage_worker import run_stages
from swarmtrain.training.swarm import Swarm
from swarmtrain_peer.site import Site
from swarmtrain_peer.spawn import watch_owner
from swarmtrain_protocols import limits
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import NoDevice, SwarmError
from swarmtrain_protocols.manifest import RunKeys

NICENESS = 10
EVALUATION_WINDOWS = 128
SIGNALLED_FLUSH_S = 5.0


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        NoDevice: a device that torch does not know or cannot use here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise NoDevice(f"device {name}", str(error).splitlines()[0], "use --device cpu") from None
    return device


class PresetTrainer:
    """One trainer process, from the run keys to its last step."""

    def __init__(
        self,
        site: Site,
        keys: RunKeys,
        device: torch.device,
        signals: Signals,
        wait_s: float = 0.0,
    ) -> None:
        """Load the corpus, build the model and attach, waiting ``wait_s`` for a peer process.

        Raises:
            SwarmError: no corpus, no peer process, or a refusal.
        """
        self.keys = keys
        self.device = device
        self._signals = signals
        self.corpus: Corpus = obtain_corpus(site, keys, wait_s, signals.event)
        fields = {name: getattr(keys, name) for name in RunKeys.__struct_fields__}
        self.preset: Preset = build(fields, device)
        vocabulary = self.preset.model.sizes.vocabulary
        self.corpus.check_vocabulary(vocabulary)
        tokens, targets = self.corpus.evaluation(EVALUATION_WINDOWS, self.preset.context)
        self._held_out = (torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device))

        def connect() -> Control:
            return site.connect()

        await_peer(site, wait_s, signals.event)
        announce_corpus(site, keys)
        self.swarm = Swarm(
            self.preset.model, self.preset.optimizer, connect=connect, fragments=keys.fragments
        )
        # θ goes into a model of its own, the trained one stays as it is.
        self._judge = Judge(self.swarm, build(fields, device).model)
        Speaker(self.swarm, self._judge, context=self.preset.context, vocabulary=vocabulary)
        self.swarm.on("evaluate", self._evaluate)
        attached = self.swarm.attached
        assert attached is not None, "it is not offline"
        self._dealer: Dealer | None = None
        if keys.shards:
            context = self.preset.context
            digest = data_digest("corpus", keys.corpus_hash.hex(), context)
            self._dealer = self.swarm.deal(self.corpus.samples(context), digest)
            self._dealer.stop_when(lambda: bool(signals.received))
        self._ordinal = attached.attached.ordinal
        self._counter = attached.attached.next_position
        self._inner: InnerStep | None = None
        # A step of the schedule is one of each of ``start_peers`` members, whoever made it.
        self._samples_per_step = keys.batch_size * keys.start_peers

    def train(self, steps: int) -> None:
        """Train until the run ends, or for ``steps`` steps (0: no limit).

        Raises:
            Diverged: this trainer's progress was NaN or infinite several times in a row.
        """
        swarm = self.swarm
        while not swarm.should_stop and not self._signals.received:
            if steps and swarm.state.step >= steps:
                swarm.finish()
                break
            found = self._batch()
            if found is not None:
                self._step(*found)
        if swarm.error is not None:
            raise swarm.error

    def _batch(self) -> tuple[I64, I64] | None:
        """The next batch; None if the run ended while nothing was left to this member."""
        context, size = self.preset.context, self.keys.batch_size
        if self._dealer is not None:
            numbers = self._dealer.take(size)
            if not numbers.size:
                return None
            return self.corpus.windows(numbers, self._dealer.epochs, context)
        position = position_of(self._ordinal, self._counter)
        self._counter += 1
        self.swarm.next_position = self._counter
        return self.corpus.batch(self.keys.seed, position, size, context)

    def _step(self, tokens: I64, targets: I64) -> None:
        preset, swarm = self.preset, self.swarm
        if swarm.inner is not None and swarm.inner != self._inner:
            self._inner = swarm.inner
            preset.follow(swarm.inner)
        preset.set_lr(swarm.state.step, int(swarm.progress / self._samples_per_step))
        loss = preset.loss(
            torch.from_numpy(tokens).to(self.device), torch.from_numpy(targets).to(self.device)
        )
        torch.autograd.backward(loss)
        if preset.clip:
            torch.nn.utils.clip_grad_norm_(preset.model.parameters(), preset.clip)
        swarm.log(loss=loss.item())
        preset.optimizer.step()
        preset.optimizer.zero_grad()

    def _evaluate(self, event: Document) -> None:
        """Loss of the newest θ, reported under the round that it is of."""
        round_ = min(self._judge.load())
        loss = evaluate(self._judge.model, *self._held_out)
        self.swarm.evaluated(round_, loss, self._held_out[1].numel())


class Signals:
    """SIGTERM and SIGINT end training politely; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self.event = threading.Event()
        self._before: dict[int, Any] = {}

    def stop(self, number: int) -> None:
        """As if signal ``number`` had arrived."""
        self.received = number
        self.event.set()
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, lambda got, _: self.stop(got))
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def be_nice() -> None:
    """Give way to peer processes from here on: they must get a processor when a message arrives.

    Not while starting: on a machine that others train on, the first seconds of processor time,
    which import torch, would be had a tenth at a time.
    """
    if os.nice(0) == 0:
        os.nice(NICENESS)


def run(site: Site, device_name: str, steps: int, threads: int, wait_s: float = 0.0) -> int:
    """Train at ``site``, on the main thread; returns the exit code.

    Its peer process may come up as late as ``wait_s`` after the model is built.

    Raises:
        SwarmError: whatever keeps it from training.
    """
    device = choose_device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    with Signals() as signals:
        watch_owner(lambda: os.kill(os.getpid(), signal.SIGTERM))
        keys = await_run_keys(site, limits.TRAINER_WAIT_S_MAX, signals.event)
        if keys.stages:
            sys.stderr.write(f"serving stages of {keys.preset} on {device}\n")
            be_nice()
            run_stages(site, keys, device, signals.event, wait_s)
            return 128 + signals.received if signals.received else 0
        trainer = PresetTrainer(site, keys, device, signals, wait_s)
        sys.stderr.write(f"training {keys.preset} on {device}\n")
        be_nice()
        try:
            trainer.train(steps)
        finally:
            trainer.swarm.close(SIGNALLED_FLUSH_S if signals.received else None)
        return 128 + signals.received if signals.received else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m swarmtrain.training.trainer")
    parser.add_argument("site", type=Path, help="the site's folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--steps", type=int, default=0, help="inner steps; 0: until the run ends")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--wait-s", type=float, default=0.0, help="for a peer process to come up")
    given = parser.parse_args(arguments)
    try:
        return run(
            Site(given.site.resolve()), given.device, given.steps, given.threads, given.wait_s
        )
    except SwarmError as error:
        sys.stderr.write(f"error: {error.what}\nwhy:   {error.why}\ndo:    {error.todo}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
