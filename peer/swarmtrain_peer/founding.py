"""Founding a run with the corpus pinned: the founder's copy is what all others train on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from swarmtrain_peer.config import PeerConfig
from swarmtrain_peer.corpusfile import build_corpus, hash_corpus
from swarmtrain_peer.site import Site, found_site
from swarmtrain_protocols.errors import DataUnavailable
from swarmtrain_protocols.manifest import RunKeys


def pin_corpus(keys: RunKeys) -> RunKeys:
    """``keys`` with the hash of the corpus as it is on this machine; a given hash stays.

    Raises:
        DataUnavailable: it is not here, so nobody can say what its hash is.
    """
    if keys.corpus_hash:
        return keys
    try:
        return msgspec.structs.replace(keys, corpus_hash=hash_corpus(keys.corpus))
    except DataUnavailable as error:
        todo = "found the run where the corpus is, or give its hash as train.corpus_hash"
        raise DataUnavailable(error.what, error.why, error.todo or todo) from None


def found_run(home: Path, keys: RunKeys, config: PeerConfig) -> Site:
    """Found a run, pin its corpus, and keep a copy at this site, from which others fetch it.

    If ``keys`` give a hash and the corpus is not here, the run is founded without a copy: somebody
    else has to bring it.

    Raises:
        DataUnavailable: no corpus and no hash, or what is here does not have the hash given.
        ConfigError: see ``found_site``.
        DiskFull, CheckpointError: the copy cannot be written.
    """
    here = True
    if keys.corpus_hash:
        here = _is_here(keys)
    pinned = pin_corpus(keys)
    site = found_site(home, pinned, config)
    if here:
        build_corpus(pinned.corpus, site.corpus_path, pinned.corpus_hash)
    return site


def _is_here(keys: RunKeys) -> bool:
    try:
        found = hash_corpus(keys.corpus)
    except DataUnavailable:
        return False
    if found != keys.corpus_hash:
        raise DataUnavailable(
            f"corpus {keys.corpus}",
            f"its hash here is {found.hex()}, train.corpus_hash says {keys.corpus_hash.hex()}",
            "leave train.corpus_hash out to pin what is here",
        )
    return True


def same_run(wanted: RunKeys, founded: RunKeys) -> bool:
    """Whether a run founded with ``founded`` is what ``wanted`` asks for.

    Without a hash in ``wanted`` the corpus of then is as good as that of now.
    """
    if not wanted.corpus_hash:
        wanted = msgspec.structs.replace(wanted, corpus_hash=founded.corpus_hash)
    return wanted == founded
