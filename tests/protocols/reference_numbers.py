"""Independent references for the numbers, in plain Python and struct, and the writer of vectors.

fp32 arithmetic is done in fp64 and rounded once per operation. That is exact: fp64 has more than
twice the digits of fp32 plus two, so the second rounding never changes a sum, product or quotient
(Figueroa 1995); so does a square root. Run as a module to rewrite
``protocols/vectors/{codecs,outer,overlap,stageopt}.json``.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parents[2] / "protocols" / "vectors"
BLOCK = 256
TINY = 2.0**-100


def f32(value: float) -> float:
    """Round to the nearest fp32, ties to even; overflow gives infinity."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def pack(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def unpack(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def encode(codec: str, values: Sequence[float]) -> bytes:
    if codec == "fp32":
        return pack(values)
    if codec == "bf16":
        return b"".join(_bf16(value) for value in values)
    scales: list[float] = []
    codes: list[int] = []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        absmax = max(abs(value) for value in block)
        if absmax < TINY:
            scales.append(0.0)
            codes += [0] * len(block)
            continue
        scales.append(f32(absmax / 127.0))
        inverse = f32(127.0 / absmax)
        codes += [round(f32(value * inverse)) for value in block]  # ties to even
    return pack(scales) + struct.pack(f"<{len(codes)}b", *codes)


def _bf16(value: float) -> bytes:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low, high = bits & 0xFFFF, bits >> 16
    if low > 0x8000 or (low == 0x8000 and high % 2):
        high += 1
    return struct.pack("<H", high)


def decode(codec: str, data: bytes, n: int) -> list[float]:
    if codec == "fp32":
        return unpack(data)
    if codec == "bf16":
        return [
            float(struct.unpack("<f", b"\0\0" + data[i : i + 2])[0]) for i in range(0, 2 * n, 2)
        ]
    blocks = -(-n // BLOCK)
    scales = unpack(data[: 4 * blocks])
    codes = struct.unpack(f"<{n}b", data[4 * blocks :])
    return [f32(scales[i // BLOCK] * code) for i, code in enumerate(codes)]


def accumulate(acc: Sequence[float], weight: float, decoded: Sequence[float]) -> list[float]:
    return [f32(a + f32(weight * d)) for a, d in zip(acc, decoded, strict=True)]


def outer_step(
    theta: Sequence[float], momentum: Sequence[float], mean: Sequence[float], lr: float, beta: float
) -> tuple[list[float], list[float]]:
    new_theta, new_momentum = [], []
    for t, b, m in zip(theta, momentum, mean, strict=True):
        moved = f32(f32(beta * b) + m)
        step = f32(m + f32(beta * moved))
        new_momentum.append(moved)
        new_theta.append(f32(t - f32(lr * step)))
    return new_theta, new_momentum


# The overlay in fp64, from the whole history, term by term: no state is carried along.

OVERLAP_SCRIPT: list[dict[str, Any]] = [
    {"weight": 0.5, "outcome": 0.5},
    {"weight": 0.5, "outcome": None},
    {"weight": 0.25, "outcome": 0.375},
    {"weight": 0.25, "outcome": 0.0},
    {"weight": 0.5, "outcome": None},
    {"weight": 0.5, "outcome": 0.0},
    {"weight": 0.75, "outcome": 0.625},
    {"weight": 1.0, "outcome": 1.0},
]


class OverlapOracle:
    """What an overlay must do, computed from the list of everything that has happened.

    ``commits`` holds, for each committed round, the (coefficient, contribution) of this site or
    None. ``waiting`` holds the fresh contributions that are in no committed round yet.
    """

    def __init__(self, mode: str, n: int, lr: float, beta: float) -> None:
        self.mode, self.n, self.lr, self.beta = mode, n, lr, beta
        self.commits: list[tuple[float, list[float]] | None] = []
        self.waiting: list[list[float]] = []
        self.base = [0.0] * n

    def contribution(self) -> list[float]:
        return [sum(fresh[i] for fresh in self.waiting) for i in range(self.n)]

    def momentum(self) -> list[float]:
        total = [0.0] * self.n
        for age, commit in enumerate(reversed(self.commits)):
            if commit is not None:
                factor = self.beta**age * commit[0]
                total = [t + factor * d for t, d in zip(total, commit[1], strict=True)]
        return total

    def view(self, theta: Sequence[float], weight: float) -> list[float]:
        """Theta as it would be if the waiting contribution alone were committed to own momentum."""
        if self.mode != "eager":
            return list(theta)
        out = []
        for t, a, d in zip(theta, self.momentum(), self.contribution(), strict=True):
            mean = weight * d
            out.append(t - self.lr * (mean + self.beta * (self.beta * a + mean)))
        return out

    def boundary(self, x: Sequence[float]) -> list[float]:
        self.waiting.append([b - v for b, v in zip(self.base, x, strict=True)])
        return self.contribution()

    def decided(self, coefficient: float | None) -> None:
        if coefficient is None:
            return
        if coefficient == 0.0:
            self.commits.append(None)
            return
        self.commits.append((coefficient, self.contribution()))
        self.waiting = []


def overlap_trajectory(mode: str, n: int, lr: float, beta: float, seed: int) -> dict[str, Any]:
    """A run of one site: theta moves by committed means, x by made-up inner steps."""
    draw = random.Random(seed)
    oracle = OverlapOracle(mode, n, lr, beta)
    theta = [draw.uniform(-1, 1) for _ in range(n)]
    b = [0.0] * n
    oracle.base = list(theta)
    result: dict[str, Any] = {"mode": mode, "lr": lr, "beta": beta, "theta": theta, "phases": []}
    for step in OVERLAP_SCRIPT:
        progress = [draw.uniform(-0.2, 0.2) for _ in range(n)]
        others = [draw.uniform(-0.2, 0.2) for _ in range(n)]
        x = [v - p for v, p in zip(oracle.base, progress, strict=True)]
        delta = oracle.boundary(x)
        if mode != "off":
            oracle.base = oracle.view(theta, step["weight"])
            before = oracle.base
        outcome = step["outcome"]
        if outcome is not None:
            mean = [outcome * d + o for d, o in zip(delta, others, strict=True)]
            b = [beta * old + m for old, m in zip(b, mean, strict=True)]
            theta = [t - lr * (m + beta * v) for t, m, v in zip(theta, mean, b, strict=True)]
        oracle.decided(outcome)
        if mode == "off":
            oracle.base = list(theta)
            before = oracle.base
        phase = {**step, "progress": progress, "delta": delta, "theta": theta, "base": before}
        result["phases"].append(phase)
    return result


def _inputs() -> dict[str, list[float]]:
    draw = random.Random(20240229)
    gauss = [f32(draw.gauss(0, 1)) for _ in range(300)]
    denormal = 2.0**-149
    return {
        "gaussian, last block short": gauss,
        "ties": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5],
        "zeros": [0.0, -0.0, 0.0],
        "denormals": [denormal, -denormal * 5, denormal * 127, 2.0**-126],
        "below and at the smallest scale": [f32(TINY * (1 - 2.0**-24)), -TINY],
        "smallest block that keeps its values": [TINY, -TINY / 2, TINY / 127],
        "huge": [2.0**99, -(2.0**98), 2.0**91, 1.0],
        "two blocks of different scale": [1e-3] * 255 + [-2e-3] + [1e3, -500.0, 3.9],
        "bf16 ties": [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), f32(1 + 2.0**-8 + 2.0**-20)],
    }


def build_codecs() -> dict[str, Any]:
    draw = random.Random(7)
    cases = []
    for codec in ("fp32", "bf16", "int8"):
        for name, values in _inputs().items():
            data = encode(codec, values)
            decoded = decode(codec, data, len(values))
            weight = f32(draw.uniform(0, 1))
            acc = [f32(draw.gauss(0, 1)) for _ in values]
            cases.append(
                {
                    "codec": codec,
                    "case": name,
                    "n": len(values),
                    "values": pack(values).hex(),
                    "encoded": data.hex(),
                    "decoded": pack(decoded).hex(),
                    "weight": pack([weight]).hex(),
                    "acc_before": pack(acc).hex(),
                    "acc_after": pack(accumulate(acc, weight, decoded)).hex(),
                }
            )
    return {"spec": "06-codecs.md", "cases": cases}


def build_outer() -> dict[str, Any]:
    draw = random.Random(11)
    cases = []
    for lr, beta in ((0.7, 0.9), (1.0, 0.0), (0.4, 0.9), (0.25, 0.9)):
        lr, beta = f32(lr), f32(beta)
        theta = [f32(draw.gauss(0, 1)) for _ in range(16)] + [0.0, -0.0, 2.0**-149, f32(3e30)]
        momentum = [f32(draw.gauss(0, 0.01)) for _ in range(16)] + [
            -0.0,
            0.0,
            2.0**-140,
            f32(-1e30),
        ]
        rounds = []
        for _ in range(3):
            mean = [f32(draw.gauss(0, 0.01)) for _ in range(16)] + [
                0.0,
                -0.0,
                -(2.0**-141),
                f32(1e30),
            ]
            before = (theta, momentum)
            theta, momentum = outer_step(theta, momentum, mean, lr, beta)
            rounds.append(
                {
                    "theta_before": pack(before[0]).hex(),
                    "momentum_before": pack(before[1]).hex(),
                    "mean": pack(mean).hex(),
                    "theta": pack(theta).hex(),
                    "momentum": pack(momentum).hex(),
                }
            )
        cases.append({"lr": pack([lr]).hex(), "beta": pack([beta]).hex(), "rounds": rounds})
    return {"spec": "07-outer-step.md", "cases": cases}


def build_overlap() -> dict[str, Any]:
    modes = ("off", "delayed", "eager")
    runs = [overlap_trajectory(m, 3, 0.4, 0.9, i) for i, m in enumerate(modes)]
    return {"spec": "07-outer-step.md", "unit": "fp64, compare to 1e-12", "runs": runs}


def adamw_step(
    theta: Sequence[float],
    m: Sequence[float],
    v: Sequence[float],
    gradient: Sequence[float],
    numbers: dict[str, float],
) -> tuple[list[float], list[float], list[float]]:
    """AdamW of spec 07: one value after the other, every operation rounded to fp32."""
    out: tuple[list[float], list[float], list[float]] = ([], [], [])
    k = numbers
    for x, first, second, given in zip(theta, m, v, gradient, strict=True):
        g = f32(k["scale"] * given)
        first = f32(f32(k["beta1"] * first) + f32(k["rest1"] * g))
        second = f32(f32(k["beta2"] * second) + f32(k["rest2"] * f32(g * g)))
        below = f32(f32(f32(math.sqrt(second)) / k["root2"]) + k["eps"])
        x = f32(f32(k["keep"] * x) - f32(k["rate"] * f32(first / below)))
        for kept, value in zip(out, (x, first, second), strict=True):
            kept.append(value)
    return out


def sgd_step(
    theta: Sequence[float], gradient: Sequence[float], scale: float, rate: float
) -> list[float]:
    """SGD of spec 07."""
    return [f32(x - f32(rate * f32(scale * g))) for x, g in zip(theta, gradient, strict=True)]


def adamw_numbers(
    lr: float, decay: float, step: int, scale: float = 1.0, recovered: int = 0
) -> dict[str, float]:
    """The numbers of a step of spec 07 for a learning rate, from exact rationals rounded once."""
    n = step - recovered + 1
    beta1, beta2 = Fraction(0.9), Fraction(0.99)
    below1, below2 = 1 - beta1**n, 1 - beta2**n
    return {
        "scale": f32(scale),
        "beta1": f32(0.9),
        "rest1": f32(float(1 - beta1)),
        "beta2": f32(0.99),
        "rest2": f32(float(1 - beta2)),
        "root2": f32(math.sqrt(float(below2))),
        "eps": f32(1e-8),
        "keep": f32(float(1 - Fraction(lr) * Fraction(decay))),
        "rate": f32(float(Fraction(lr) / below1)),
    }


def square_norm(values: Sequence[float]) -> float:
    """256 lanes, each a sum in fp64 in order; then the sum of the lanes in order."""
    lanes = [0.0] * BLOCK
    for index, value in enumerate(values):
        lanes[index % BLOCK] += value * value
    total = 0.0
    for lane in lanes:
        total += lane
    return total


def build_stageopt() -> dict[str, Any]:
    draw = random.Random(23)
    special = [0.0, -0.0, 2.0**-149, f32(1e30)]
    cases = []
    for lr, decay, scale in ((3e-3, 0.1, 1.0), (0.05, 0.0, f32(0.37))):
        theta = [f32(draw.gauss(0, 1)) for _ in range(12)] + special
        m, v = [0.0] * 16, [0.0] * 16
        steps = []
        for step in (0, 1, 2):
            gradient = [f32(draw.gauss(0, 0.1)) for _ in range(12)] + special[::-1]
            numbers = adamw_numbers(lr, decay, step, scale)
            before = theta
            theta, m, v = adamw_step(theta, m, v, gradient, numbers)
            fields = {"theta_before": before, "gradient": gradient, "theta": theta, "m": m, "v": v}
            steps.append(
                {"step": step, "numbers": pack(list(numbers.values())).hex()}
                | {name: pack(values).hex() for name, values in fields.items()}
            )
        cases.append({"lr": lr, "weight_decay": decay, "scale": scale, "steps": steps})
    theta = [f32(draw.gauss(0, 1)) for _ in range(12)] + special
    gradient = [f32(draw.gauss(0, 0.1)) for _ in range(12)] + special[::-1]
    rate, scale = f32(0.3), f32(0.71)
    sgd = {"rate": rate, "scale": scale, "theta_before": pack(theta).hex()}
    sgd |= {"gradient": pack(gradient).hex()}
    sgd |= {"theta": pack(sgd_step(theta, gradient, rate=rate, scale=scale)).hex()}
    values = [f32(draw.gauss(0, 1e3)) for _ in range(700)]
    norm = {
        "values": pack(values).hex(),
        "square_norm": struct.pack("<d", square_norm(values)).hex(),
    }
    return {"spec": "07-outer-step.md", "adamw": cases, "sgd": sgd, "norm": norm}


BUILDERS = {
    "codecs": build_codecs,
    "outer": build_outer,
    "overlap": build_overlap,
    "stageopt": build_stageopt,
}


def main() -> None:
    for name, build in BUILDERS.items():
        path = VECTORS / f"{name}.json"
        path.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
