"""Where the text of a corpus comes from: files, rows of data sets, tokens (spec 12 §1.3).

A source is named by one line, ``KIND:PLACE?option=value&…``, which stands in the manifest; what it
yields is pinned by its hash. Packages that only some kinds need are imported when they are used:
``pyarrow`` (parquet), ``datasets`` (hf), ``tokenizers``.
"""

from __future__ import annotations

import json
import os
import sysconfig
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import DataUnavailable

SEPARATOR = b"\n\n"
"""Behind each row; between rows that are tokenized stands an end-of-text token instead."""
_OPTIONS = {
    "path": ("text", "tokenizer"),
    "tokens": (),
    "hf": ("config", "split", "text", "rows", "streaming", "tokenizer"),
    "stdlib": (),
}
_PLAIN = (".py", ".txt", ".md", ".rst", ".c", ".h", ".json", ".html", ".toml", ".tex", ".csv")
_ROWS = (".jsonl", ".parquet")
_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
_SKIPPED = (
    "test",
    "tests",
    "idlelib",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "ensurepip",
)
TOKEN_BYTES = 2
"""A token of a corpus of tokens: u16, little-endian."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is held out as a whole, or not at all: a file, or a data set. ``pieces`` reads it.

    ``nbytes``: before it is read; 0 if that cannot be known.
    """

    label: str
    pieces: Callable[[], Iterator[bytes]]
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Named:
    """The parts of a source's name."""

    kind: str
    place: str
    options: dict[str, str]

    @property
    def item_bytes(self) -> int:
        """Bytes of one thing that a model reads: 1 (a byte) or 2 (a token)."""
        return TOKEN_BYTES if self.kind == "tokens" or "tokenizer" in self.options else 1


def parse_source(name: str) -> Named:
    """Take a source's name apart.

    Raises:
        DataUnavailable: no such kind or option.
    """
    head, _, query = name.partition("?")
    kind, _, place = head.partition(":")
    if kind not in _OPTIONS or (place == "") != (kind == "stdlib"):
        todo = "use stdlib, path:FOLDER, tokens:FOLDER or hf:NAME"
        raise DataUnavailable("corpus", f"unknown source {name!r}", todo)
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS[kind]:
            known = ", ".join(_OPTIONS[kind]) or "none"
            raise DataUnavailable(
                f"corpus {name}", f"{kind} has no option {option!r}", f"known: {known}"
            )
    return Named(kind, place, options)


def units_of(name: str) -> list[Unit]:
    """The units of a source, in the order of the corpus.

    Raises:
        DataUnavailable: unknown, not here, too many files, or a package is missing.
    """
    named = parse_source(name)
    if named.kind == "hf":
        units = [_data_set(named)]
    elif named.kind == "stdlib":
        paths = _files(Path(sysconfig.get_path("stdlib")), (".py",), _SKIPPED)
        units = [_file(path, named) for path in paths]
    else:
        suffixes = (".npy",) if named.kind == "tokens" else (*_PLAIN, *_ROWS)
        units = [_file(path, named) for path in _below(named.place, suffixes)]
    if "tokenizer" in named.options:
        encode = _tokenizer(named.options["tokenizer"])
        units = [Unit(unit.label, _encoded(unit, encode)) for unit in units]
    return units


# -- files ------------------------------------------------------------------------------------


def _below(place: str, suffixes: tuple[str, ...]) -> list[Path]:
    found = Path(place).expanduser()
    if found.is_file() and found.name.endswith(suffixes):
        return [found]
    if not found.is_dir():
        raise DataUnavailable("corpus", f"{found} is not a folder here")
    return _files(found, suffixes, ("__pycache__",))


def _files(folder: Path, suffixes: tuple[str, ...], skipped: tuple[str, ...]) -> list[Path]:
    """Files below ``folder`` by relative path; links are not followed, ``skipped`` not entered."""
    found: list[tuple[str, Path]] = []
    for parent, below, names in os.walk(folder):
        below[:] = [name for name in below if name not in skipped]
        for name in names:
            path = Path(parent, name)
            if name.endswith(suffixes) and path.is_file() and not path.is_symlink():
                found.append((path.relative_to(folder).as_posix(), path))
        if len(found) > limits.CORPUS_FILES_MAX:
            raise DataUnavailable(
                f"corpus path:{folder}",
                f"more than {limits.CORPUS_FILES_MAX} files",
                "name a folder with fewer",
            )
    return [path for _, path in sorted(found)]


def _file(path: Path, named: Named) -> Unit:
    as_it_is = path.suffix not in (*_ROWS, ".npy")
    return Unit(str(path), _reader(path, named), path.stat().st_size if as_it_is else 0)


def _reader(path: Path, named: Named) -> Callable[[], Iterator[bytes]]:
    column = named.options.get("text", "text")
    if path.suffix == ".jsonl":
        return lambda: _rows(_json_lines(path), column, str(path))
    if path.suffix == ".parquet":
        return lambda: _rows(_parquet(path, column), column, str(path))
    if named.kind == "tokens":
        return lambda: _tokens(path)
    whole = "tokenizer" in named.options  # a file is one document
    return lambda: iter([path.read_bytes()]) if whole else _raw(path)


def _raw(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(limits.CORPUS_CHUNK_BYTES):
            yield piece


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                why = f"{path}, line {number}: {error}"
                raise DataUnavailable("corpus", why, "one JSON object on each line") from None


def _parquet(path: Path, column: str) -> Iterator[Any]:
    parquet = _package("pyarrow.parquet", f"{path} is a parquet file")
    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataUnavailable("corpus", f"{path} has no column {column!r}: {names}", "name one")
        for batch in file.iter_batches(columns=[column]):
            yield from ({column: text} for text in batch.column(0).to_pylist())


def _rows(rows: Iterable[Any], column: str, where: str) -> Iterator[bytes]:
    """The text of each row, ended by an empty line."""
    for number, row in enumerate(rows):
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            why = f"{where}, row {number}: no text in {column!r}, there is {names}"
            raise DataUnavailable("corpus", why, "name the column: ?text=COLUMN")
        yield text.encode() + SEPARATOR


def _tokens(path: Path) -> Iterator[bytes]:
    """Token ids of one file of numbers, as u16."""
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataUnavailable("corpus", f"{path}: {error}", "save it with numpy.save") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        why = f"{path}: {found.dtype} of shape {found.shape}"
        raise DataUnavailable("corpus", why, "token ids are whole numbers in one dimension")
    step = limits.CORPUS_CHUNK_BYTES // TOKEN_BYTES
    for begin in range(0, len(found), step):
        part = np.asarray(found[begin : begin + step])
        if part.min() < 0 or part.max() >= 1 << 16:
            why = f"{path}: token ids from {part.min()} to {part.max()}"
            raise DataUnavailable("corpus", why, "ids are 0 to 65535")
        yield part.astype("<u2").tobytes()


# -- data sets and tokenizers -----------------------------------------------------------------


def _package(name: str, why: str) -> Any:
    """A package that is needed for ``why`` only.

    Raises:
        DataUnavailable: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataUnavailable(why, str(error), "pip install 'swarmtrain[data]'") from None


def _data_set(named: Named) -> Unit:
    rows = open_rows(named)
    column = named.options.get("text", "text")
    return Unit(named.place, lambda: _rows(rows, column, f"hf:{named.place}"))


_NOT_TO_BE_HAD = (OSError, ValueError, LookupError, RuntimeError, ImportError)
"""What loading a data set raises besides errors of its package: of the network, of files, of a
name or an option that does not exist. Anything else is a mistake of ours and stays one."""


def open_rows(named: Named) -> Iterable[Any]:
    """The rows of a data set: one of the hub by name, or a folder that ``save_to_disk`` wrote.

    Raises:
        DataUnavailable: it is not here and not to be had.
    """
    package = _package("datasets", f"hf:{named.place} is a data set of Hugging Face")
    options, streaming = named.options, named.options.get("streaming", "0") != "0"
    split = options.get("split", "train")
    package.disable_progress_bars()
    try:
        if Path(named.place).expanduser().is_dir():
            found = package.load_from_disk(str(Path(named.place).expanduser()))
            found = found[split] if isinstance(found, package.DatasetDict) else found
            found = found.to_iterable_dataset() if streaming else found
        else:
            config = options.get("config")
            found = package.load_dataset(named.place, config, split=split, streaming=streaming)
        rows = int(options.get("rows", "0"))
        if rows:
            found = found.take(rows)
    except (package.exceptions.DatasetsError, *_NOT_TO_BE_HAD) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        todo = "check its name, config and split, and that it can be reached"
        raise DataUnavailable(f"corpus hf:{named.place}", why, todo) from error
    rows_of: Iterable[Any] = found
    return rows_of


def _tokenizer(file: str) -> Callable[[bytes], bytes]:
    import numpy as np

    package = _package("tokenizers", f"{file} is a tokenizer")
    try:
        found = package.Tokenizer.from_file(str(Path(file).expanduser()))
    except Exception as error:
        # That package raises bare Exceptions. Nothing is swallowed: what it said is the reason of
        # an error that ends the command.
        raise DataUnavailable(f"tokenizer {file}", str(error), "name a tokenizer.json") from error
    size = found.get_vocab_size()
    if size > 1 << 16:
        raise DataUnavailable(f"tokenizer {file}", f"{size} tokens", "use one of at most 65536")
    ends = [found.token_to_id(token) for token in _END_OF_TEXT]
    end = [token for token in ends if token is not None][:1]

    def encode(text: bytes) -> bytes:
        ids = found.encode(text.decode("utf-8", "replace")).ids
        return np.array([*ids, *end], "<u2").tobytes()

    return encode


def _encoded(unit: Unit, encode: Callable[[bytes], bytes]) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        for piece in unit.pieces():
            yield encode(piece.removesuffix(SEPARATOR))

    return pieces
