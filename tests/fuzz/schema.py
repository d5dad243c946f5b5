"""Changes of typed messages that stay within their schema, so that what comes behind it is tried.

A field gets another legal value: an edge of its range, or something that other messages of the
corpus have said in a field of that kind (a member's key, a channel's name, a root), because a
random key is nobody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

from swarmtrain_protocols.errors import SwarmError

Words = dict[type, list[Any]]
"""What the corpus says, by kind: bytes, text, whole numbers."""


def words_of(values: Iterable[Any]) -> Words:
    """Every value within ``values``, each once."""
    found: Words = {bytes: [], str: [], int: []}
    seen: dict[tuple[type, Any], None] = {}
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, msgspec.Struct):
            pending += [getattr(value, name) for name in value.__struct_fields__]
        elif isinstance(value, (tuple, list)):
            pending += value
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif type(value) in found and (type(value), value) not in seen:
            seen[type(value), value] = None
            found[type(value)].append(value)
    return found


class SchemaSplice:
    """A ``Splice`` for inputs that ``decode`` takes, behind ``skip`` bytes of something else."""

    def __init__(
        self,
        decode: Callable[[bytes], Any],
        encode: Callable[[Any], bytes],
        corpus: Iterable[Any],
        otherwise: Callable[[Random, bytes], bytes],
        skip: int = 0,
    ) -> None:
        self._decode, self._encode, self._otherwise, self._skip = decode, encode, otherwise, skip
        self._words = words_of(corpus)
        self._types: dict[type, inspect.StructType] = {}

    def __call__(self, rng: Random, data: bytes) -> bytes:
        head, body = data[: self._skip], data[self._skip :]
        if head and rng.random() < 0.3:
            head = bytes([rng.randrange(16)]) + head[1:]
        if rng.random() < 0.25:
            return head + self._otherwise(rng, body)
        try:
            value = self._decode(body)
        except (SwarmError, ValueError):
            return head + self._otherwise(rng, body)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            value = self._struct(rng, value)
        return head + self._encode(value)

    def _struct(self, rng: Random, value: Any) -> Any:
        if type(value) not in self._types:
            info = inspect.type_info(type(value))
            assert isinstance(info, inspect.StructType)
            self._types[type(value)] = info
        fields = self._types[type(value)].fields
        if not fields:
            return value
        item = rng.choice(fields)
        new = self._vary(rng, getattr(value, item.name), item.type)
        return msgspec.structs.replace(value, **{item.name: new})

    def _vary(self, rng: Random, value: Any, info: inspect.Type) -> Any:
        """Another value of the type; of a container mostly the same one, changed in one place."""
        if isinstance(value, msgspec.Struct) and rng.random() < 0.9:
            return self._struct(rng, value)
        if isinstance(info, inspect.VarTupleType) and value and rng.random() < 0.85:
            return self._tuple(rng, list(value), info)
        if isinstance(info, inspect.TupleType) and value:
            items, at = list(value), rng.randrange(len(value))
            items[at] = self._vary(rng, items[at], info.item_types[at])
            return tuple(items)
        return self.legal(rng, info)

    def _tuple(self, rng: Random, items: list[Any], info: inspect.VarTupleType) -> tuple[Any, ...]:
        at, choice = rng.randrange(len(items)), rng.randrange(6)
        if choice < 2:
            items[at] = self._vary(rng, items[at], info.item_type)
        elif choice == 2:
            del items[at]
        elif choice == 3:
            rng.shuffle(items)
        elif choice == 4:
            items.insert(at, items[rng.randrange(len(items))])
        else:
            items.append(self.legal(rng, info.item_type))
        return tuple(items)

    def _sized(self, rng: Random, info: Any, words: list[Any], make: Callable[[int], Any]) -> Any:
        least, most = info.min_length or 0, info.max_length
        if rng.random() < 0.75:
            fitting = [w for w in words if least <= len(w) <= (len(w) if most is None else most)]
            if fitting:
                return rng.choice(fitting)
        return make(rng.choice((least, least, min(most or 40, least + rng.randrange(40)))))

    def legal(self, rng: Random, info: inspect.Type) -> Any:
        """A value of the type, within its bounds."""
        match info:
            case inspect.BytesType():
                return self._sized(rng, info, self._words[bytes], rng.randbytes)
            case inspect.StrType():
                return self._sized(rng, info, self._words[str], lambda n: ("x\u202e\x00é" * n)[:n])
            case inspect.IntType():
                least, most = info.ge or 0, 2**53 if info.le is None else info.le
                edges = (least, least + 1, most, most - 1, rng.choice(self._words[int] or [0]))
                return min(max(rng.choice(edges), least), most)
            case inspect.FloatType():
                odd = (math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324)
                return rng.choice((0.0, 1.0, 0.5, rng.random() * 100, *odd))
            case inspect.BoolType():
                return rng.random() < 0.5
            case inspect.LiteralType():
                return rng.choice(info.values)
            case inspect.NoneType():
                return None
            case inspect.VarTupleType():
                count = rng.choice((0, 1, 2, 5))
                count = min(max(count, info.min_length or 0), info.max_length or count)
                return tuple(self.legal(rng, info.item_type) for _ in range(count))
            case inspect.TupleType():
                return tuple(self.legal(rng, item) for item in info.item_types)
            case inspect.DictType():
                key, value = info.key_type, info.value_type
                return {
                    self.legal(rng, key): self.legal(rng, value) for _ in range(rng.choice((0, 2)))
                }
            case inspect.UnionType():
                return self.legal(rng, rng.choice(info.types))
            case inspect.StructType():
                return info.cls(**{f.name: self.legal(rng, f.type) for f in info.fields})
        raise AssertionError(f"nothing legal for {info}")
