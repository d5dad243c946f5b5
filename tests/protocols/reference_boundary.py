"""Boundary tensors in plain Python and struct, and the writer of their vectors.

Shares no code with the codecs. Run as a module to rewrite ``protocols/vectors/boundary.json``.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

from tests.protocols.reference_numbers import TINY, VECTORS, f32, pack, unpack

CODES = {"fp32": 1, "fp64": 2, "bf16": 3, "int8": 4, "fp8": 5}


def header(code: int, batch: int, time: int, width: int) -> bytes:
    return bytes([1, code, 0, 0]) + struct.pack("<III", batch, time, width)


def e4m3_value(code: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity, 0x7F is not a number."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


# Every finite magnitude, by code: 0 … 0x7E are in the order of their values.
_MAGNITUDES = [e4m3_value(code) for code in range(0x7F)]


def e4m3_code(value: float) -> int:
    """The nearest code, ties to the even one, found by looking at all of them."""
    sign = 0x80 if value < 0 or str(value) == "-0.0" else 0
    magnitude = abs(value)
    return sign | min(range(0x7F), key=lambda code: (abs(_MAGNITUDES[code] - magnitude), code % 2))


def encode(codec: str, values: Sequence[float], batch: int, time: int, width: int) -> bytes:
    head = header(CODES[codec], batch, time, width)
    if codec == "fp32":
        return head + pack(values)
    if codec == "fp64":
        return head + struct.pack(f"<{len(values)}d", *values)
    if codec == "bf16":
        return head + b"".join(_bf16(value) for value in values)
    levels = 127.0 if codec == "int8" else 448.0
    scales, codes = [], bytearray()
    for row in range(batch * time):
        part = values[row * width : (row + 1) * width]
        absmax = max(abs(value) for value in part)
        scales.append(0.0 if absmax < TINY else f32(absmax / levels))
        inverse = 0.0 if absmax < TINY else f32(levels / absmax)
        for value in part:
            scaled = f32(value * inverse)
            codes.append(round(scaled) & 0xFF if codec == "int8" else e4m3_code(scaled))
    return head + pack(scales) + bytes(codes)


def _bf16(value: float) -> bytes:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low, high = bits & 0xFFFF, bits >> 16
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high % 2 == 1)))


def decode(codec: str, data: bytes) -> list[float]:
    batch, time, width = struct.unpack("<III", data[4:16])
    rows, body = batch * time, data[16:]
    if codec == "fp32":
        return unpack(body)
    if codec == "fp64":
        return list(struct.unpack(f"<{rows * width}d", body))
    if codec == "bf16":
        pairs = [body[i : i + 2] for i in range(0, len(body), 2)]
        return [float(struct.unpack("<f", b"\0\0" + pair)[0]) for pair in pairs]
    scales, codes = unpack(body[: 4 * rows]), body[4 * rows :]
    found = []
    for i, code in enumerate(codes):
        value = float(code - 256 * (code > 127)) if codec == "int8" else e4m3_value(code)
        found.append(f32(scales[i // width] * value))
    return found


def _inputs() -> list[tuple[str, int, int, int, list[float]]]:
    rng = random.Random(20)
    gaussian = [f32(rng.gauss(0, 1)) for _ in range(2 * 3 * 8)]
    small = [f32(rng.gauss(0, 1e-6)) for _ in range(2 * 8)]
    outlier = [f32(rng.gauss(0, 1)) for _ in range(8)]
    outlier[3] = 1e6
    ties = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.0]
    halves = [448.0, 17.0, 19.0, -21.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-6 - 2.0**-11]
    tiny = [f32(2.0**-101), -f32(2.0**-140), 0.0, -0.0, 0.0, 0.0, 0.0, 0.0]
    edge = [f32(2.0**-100), 0.0, -f32(2.0**-101), 0.0, 0.0, 0.0, 0.0, 0.0]
    huge = [f32(2.0**99), -f32(2.0**98), 1.0, 0.0, -0.0, 3.0, f32(1e20), f32(1e-20)]
    return [
        ("gaussian", 2, 3, 8, gaussian),
        ("gradients", 1, 2, 8, small),
        ("an outlier and ties of int8", 1, 2, 8, outlier + ties),
        ("ties and denormals of e4m3", 1, 1, 8, halves),
        ("below and at the threshold", 1, 2, 8, tiny + edge),
        ("huge", 1, 1, 8, huge),
        ("one value", 1, 1, 1, [-3.0]),
    ]


def build() -> dict[str, Any]:
    cases = []
    for name, batch, time, width, values in _inputs():
        for codec in CODES:
            encoded = encode(codec, values, batch, time, width)
            kind = "d" if codec == "fp64" else "f"
            decoded = decode(codec, encoded)
            cases.append(
                {
                    "codec": codec,
                    "case": name,
                    "shape": [batch, time, width],
                    "values": struct.pack(f"<{len(values)}{kind}", *values).hex(),
                    "encoded": encoded.hex(),
                    "decoded": struct.pack(f"<{len(decoded)}{kind}", *decoded).hex(),
                }
            )
    tokens = {"shape": [2, 3], "ids": [0, 255, 7, 65, 1, 128]}
    packed = header(0, 2, 3, 1) + struct.pack("<6i", *tokens["ids"])
    return {"spec": "06-codecs.md", "cases": cases, "tokens": {**tokens, "encoded": packed.hex()}}


if __name__ == "__main__":
    path = VECTORS / "boundary.json"
    path.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")
