"""Sources of text: rows of files and data sets, tokens, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from swarmtrain_peer.corpus_sources import SEPARATOR, parse_source, units_of
from swarmtrain_peer.corpusfile import CorpusText, build_corpus, hash_corpus
from swarmtrain_protocols.errors import DataUnavailable

ROWS = [f"row {number}: größer, {'x' * (number % 7)}" for number in range(100)]
TEXT = b"".join(row.encode() + SEPARATOR for row in ROWS)


def body(name: str) -> bytes:
    return b"".join(CorpusText(name).chunks())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    datasets.Dataset.from_dict({"text": ROWS, "n": range(100)}).save_to_disk(str(folder))
    return folder


def test_rows_of_every_kind_of_file_are_the_same_text(tmp_path: Path, saved: Path) -> None:
    lines = tmp_path / "lines" / "a.jsonl"
    lines.parent.mkdir()
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS), "utf-8")
    table = tmp_path / "table" / "a.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"body": ROWS}), table)
    names = [
        f"path:{lines.parent}",
        f"path:{lines}",
        f"path:{table.parent}?text=body",
        f"hf:{saved}",
        f"hf:{saved}?streaming=1",
    ]
    assert [body(name) for name in names] == [TEXT] * len(names)
    assert body(f"hf:{saved}?rows=3") == body(f"hf:{saved}?streaming=1&rows=3")
    assert len({hash_corpus(name) for name in names}) == 1


def test_a_split_of_several_and_the_last_twentieth_held_out(tmp_path: Path) -> None:
    parts = {"train": ["a" * 99] * 19, "test": ["b" * 50]}
    splits = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))
    assert body(f"hf:{tmp_path / 'dict'}?split=test") == b"b" * 50 + SEPARATOR
    file = build_corpus(f"hf:{tmp_path / 'dict'}", tmp_path / "site")
    assert len(file.held_out) == (19 * 101) // 20


def tokenizer(folder: Path, words: int, end: str = "<|endoftext|>") -> Path:
    names = {"[UNK]": 0, end: 1, "row": 2, **{str(n): n + 3 for n in range(words - 3)}}
    made = tokenizers.Tokenizer(WordLevel(names, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_makes_tokens_of_each_row_and_ends_it(tmp_path: Path, saved: Path) -> None:
    file = tokenizer(tmp_path, 60)
    name = f"hf:{saved}?tokenizer={file}"
    ids = np.frombuffer(body(name), "<u2")
    expected = tokenizers.Tokenizer.from_file(str(file))
    assert ids.tolist() == [n for row in ROWS for n in [*expected.encode(row).ids, 1]]
    assert ids.max() < 60 and (ids == 2).sum() == 100
    assert parse_source(name).item_bytes == 2 and CorpusText(name).train_bytes % 2 == 0
    with pytest.raises(DataUnavailable, match="70000 tokens"):
        body(f"hf:{saved}?tokenizer={tokenizer(tmp_path, 70_000)}")
    (tmp_path / "tokenizer.json").write_text("no")
    with pytest.raises(DataUnavailable, match="tokenizer"):
        body(name)


def test_a_file_is_one_document_to_a_tokenizer(tmp_path: Path) -> None:
    file = tokenizer(tmp_path, 60)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("row 4\n\nrow 5")
    assert np.frombuffer(body(f"path:{folder}?tokenizer={file}"), "<u2").tolist() == [2, 7, 2, 8, 1]


def test_tokens_of_files_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 60_000, n) for n in (700_000, 3)]
    for number, (part, kind) in enumerate(zip(parts, (np.int64, np.uint16), strict=True)):
        np.save(tmp_path / f"{number}.npy", part.astype(kind))
    name = f"tokens:{tmp_path}"
    held_out_first = CorpusText(name)
    assert sorted(np.frombuffer(body(name), "<u2")) == sorted(np.concatenate(parts))
    assert held_out_first.train_bytes % 2 == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ftp:there", "unknown source"),
        ("stdlib:there", "unknown source"),
        ("path:", "unknown source"),
        ("path:/there?columns=a", "no option 'columns'"),
        ("tokens:/there?text=a", "no option 'text'"),
        ("path:/does/not/exist", "is not a folder here"),
        ("hf:/does/not/exist-at-all", "exist-at-all|NotFound|Error"),
    ],
)
def test_what_cannot_be_opened_is_said_with_its_name(
    name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataUnavailable, match=why) as caught:
        units_of(name)
        body(name)
    assert caught.value.exit_code == 10


def test_rows_without_text_are_named(tmp_path: Path, saved: Path) -> None:
    lines = tmp_path / "a.jsonl"
    for content, why in (
        ('{"text": "a"}\n{"body": "b"}\n', "row 1: no text in 'text', there is body"),
        ('{"text": 3}\n', "row 0"),
        ("[1]\n", "row 0"),
        ('{"text": "a"}\nnot json\n', "line 2"),
    ):
        lines.write_text(content)
        with pytest.raises(DataUnavailable, match=why):
            body(f"path:{lines}")
    with pytest.raises(DataUnavailable, match="no text in 'n'"):
        body(f"hf:{saved}?text=n")
    pq.write_table(pa.table({"body": ROWS}), tmp_path / "a.parquet")
    with pytest.raises(DataUnavailable, match="no column 'text': body"):
        body(f"path:{tmp_path / 'a.parquet'}")


@pytest.mark.parametrize("wrong", [[[1, 2]], [1.5], [-1], [1 << 16]])
def test_what_is_no_token_is_named(tmp_path: Path, wrong: list[object]) -> None:
    np.save(tmp_path / "a.npy", np.array(wrong))
    with pytest.raises(DataUnavailable, match=r"a\.npy"):
        body(f"tokens:{tmp_path}")
    (tmp_path / "a.npy").write_bytes(b"no")
    with pytest.raises(DataUnavailable, match=r"a\.npy"):
        body(f"tokens:{tmp_path}")


def test_a_missing_package_is_named_with_what_installs_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataUnavailable, match="data set of Hugging Face") as caught:
        body(f"hf:{saved}")
    assert "swarmtrain[data]" in caught.value.todo
