"""Key files: 32 secret bytes (an Ed25519 seed) that only their owner can read.

A site's identity and a run's founder key are kept alike. A file that others could read is refused,
not repaired: its secret may have been read already.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from swarmtrain_protocols.errors import ConfigError
from swarmtrain_protocols.identity import Ed25519Keyring

SEED_BYTES = 32


class Secret:
    """Bytes that do not show up in a ``repr``, a log line, a traceback or a pickle.

    ``reveal()`` is the one way to them, so that every use can be found by searching for it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and secrets.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not serialized")


def create_key_file(path: Path, seed: bytes | None = None) -> Secret:
    """Write a new key file, mode 0600, durable; the folder is created with mode 0700 if missing.

    Args:
        path: must not exist, not even as a link.
        seed: 32 bytes; drawn from the operating system if left out.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    value = secrets.token_bytes(SEED_BYTES) if seed is None else seed
    assert len(value) == SEED_BYTES
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written aside and linked into place: nobody ever sees a short key file, and link() fails
        # if the name is taken, as O_EXCL would.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        raise ConfigError(
            f"key file {path}", "it exists already", "remove it if you want a new identity"
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None
    return Secret(value)


def read_key_file(path: Path) -> Secret:
    """Read a key file after checking that it is a plain file of ours that only we can read.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: a link or folder, other people may read it, wrong size, not readable.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        _check_key_file(path, os.fstat(handle))
        value = os.read(handle, SEED_BYTES)
    finally:
        os.close(handle)
    if len(value) != SEED_BYTES:
        raise ConfigError(f"key file {path}", "it shrank while being read", "try again")
    return Secret(value)


def _check_key_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"key file {path}", "not a plain file", "name a file")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"key file {path}",
            f"others may read it (mode {stat.S_IMODE(status.st_mode):04o})",
            f"if nobody has: chmod 600 {path}; else remove it and make a new key",
        )
    if status.st_size != SEED_BYTES:
        raise ConfigError(
            f"key file {path}",
            f"{status.st_size} bytes instead of {SEED_BYTES}",
            "restore it from a copy, or remove it to get a new identity",
        )


def load_or_create_key(path: Path) -> Secret:
    """The key in ``path``; a new one is created if there is none. Safe when two processes race.

    Raises:
        ConfigError: see ``read_key_file`` and ``create_key_file``.
    """
    try:
        return read_key_file(path)
    except FileNotFoundError:
        pass
    try:
        return create_key_file(path)
    except ConfigError:
        # Another process was faster: its key is the one to use. Anything else is raised again.
        try:
            return read_key_file(path)
        except FileNotFoundError:
            pass
        raise


def load_or_create_identity(path: Path) -> Ed25519Keyring:
    """The keyring of a site, from ``path``.

    Raises:
        ConfigError: see ``load_or_create_key``.
    """
    return Ed25519Keyring(load_or_create_key(path).reveal())


def load_or_create_founder(path: Path) -> Ed25519Keyring:
    """The keyring that founds runs and signs tickets, from ``path``; kept apart from identities.

    Raises:
        ConfigError: see ``load_or_create_key``.
    """
    return Ed25519Keyring(load_or_create_key(path).reveal())


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"key file {path}", error.strerror or str(error), "check the path and its permissions"
    )


def _sync_folder(folder: Path) -> None:
    """Make a new name durable (POSIX: the folder itself must be synced)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
