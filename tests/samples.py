"""Instances of any message struct, made from its own type, for tests of the schema."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import inspect


def instance(cls: type[msgspec.Struct], *, large: bool) -> Any:
    """A valid instance of ``cls``: every field at its smallest, or at a large, allowed size."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return cls(**{item.name: _value(item.type, large) for item in info.fields})


def _length(info: Any, large: bool, cap: int) -> int:
    smallest = info.min_length or 0
    largest = cap if info.max_length is None else min(info.max_length, cap)
    return max(smallest, largest) if large else smallest


def _value(info: inspect.Type, large: bool) -> Any:
    match info:
        case inspect.BytesType():
            return bytes(index % 251 for index in range(_length(info, large, 64)))
        case inspect.StrType():
            return "ü"[: int(large)] + "x" * max(0, _length(info, large, 16) - int(large))
        case inspect.IntType():
            return (info.le or 2**53) if large else (info.ge or 0)
        case inspect.FloatType():
            return 1.5 if large else 0.0
        case inspect.BoolType():
            return large
        case inspect.LiteralType():
            return info.values[-1 if large else 0]
        case inspect.NoneType():
            return None
        case inspect.VarTupleType():
            return tuple(_value(info.item_type, large) for _ in range(_length(info, large, 3)))
        case inspect.TupleType():
            return tuple(_value(item, large) for item in info.item_types)
        case inspect.DictType():
            return {_value(info.key_type, large): _value(info.value_type, large)} if large else {}
        case inspect.UnionType():
            return _value(info.types[0 if large else -1], large)
        case inspect.StructType():
            return instance(info.cls, large=large)
    raise AssertionError(f"no sample for {info}")
