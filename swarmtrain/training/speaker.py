"""Lets the swarm ask this trainer for logits, between two of its steps (``token_desk.py``).

The preset trainer does this by itself; a script of one's own says so in one line:
``Speaker(swarm, Judge(swarm, build_model()), context=…, vocabulary=…)``.
"""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import nn

from swarmtrain.training.port import Document
from swarmtrain.training.swarm import Swarm
from swarmtrain_peer import host
from swarmtrain_protocols.errors import ConfigError, SwarmError


class Judge:
    """θ in a model of its own, beside the one that is trained.

    Args:
        model: of the same parameters as the swarm's; overwritten.
    """

    def __init__(self, swarm: Swarm, model: nn.Module) -> None:
        self._swarm = swarm
        self._loaded: tuple[int, ...] | None = None
        self.model = model.eval()

    def load(self) -> tuple[int, ...]:
        """Take up the newest θ; returns the rounds of its fragments.

        Raises:
            ConfigError: the model has other parameters than the swarm's.
        """
        while True:
            shown = self._swarm.shown()
            if shown and shown == self._loaded:
                return shown
            _, vectors = self._swarm.theta()
            found = self.model.load_state_dict(self._swarm.state_dict(vectors), strict=False)
            if found.unexpected_keys:
                raise ConfigError("the model that judges", f"it lacks {found.unexpected_keys[0]}")
            self._loaded = shown
            if shown == self._swarm.shown():
                return shown or (0,)


class Speaker:
    """Answers ``generate`` events.

    Args:
        judge: maps int64 [batch, time ≤ ``context``] to logits [batch, time, ``vocabulary``].
    """

    def __init__(self, swarm: Swarm, judge: Judge, *, context: int, vocabulary: int) -> None:
        self._swarm = swarm
        self._judge = judge
        self._sizes = {"context": context, "vocabulary": vocabulary}
        swarm.on("generate", self._generate)
        swarm.on("peer_attached", lambda event: self._offer())
        self._offer()

    def _offer(self) -> None:
        self._swarm.tell("generates", dict(self._sizes))

    def _generate(self, event: Document) -> None:
        """Logits after the last token, at once: it takes a forward pass of a single sequence."""
        began_s = host.mono_s()
        answer: Document = {"job": event["job"], "wanted": event["wanted"]}
        try:
            round_ = self._judge.load()[0]
            logits = self._logits(event["tokens"])
        except (RuntimeError, IndexError, ValueError, SwarmError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"[:256]
        else:
            values = np.ascontiguousarray(logits, "<f4").tobytes()
            answer |= {"round": round_, "logits": base64.b64encode(values).decode()}
        answer["service_s"] = host.mono_s() - began_s
        self._swarm.tell("logits", answer)

    @torch.no_grad()
    def _logits(self, tokens: list[int]) -> np.ndarray:
        model = self._judge.model
        device = next(model.parameters()).device
        ids = torch.tensor([tokens], dtype=torch.int64, device=device)
        answer = model(ids)
        logits = answer if isinstance(answer, torch.Tensor) else answer.logits
        found: np.ndarray = logits[0, -1].float().cpu().numpy()
        return found
