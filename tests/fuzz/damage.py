"""Damage by a seeded generator: to bytes, places in JSON and YAML, safetensors headers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

OUTSIDE = ["../outside/canary", "/etc/passwd", "../outside/canary.safetensors", "..", "a/../../b"]
"""Names that lead out of a folder; `canary` files lie there, as sound as what they replace."""
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 0.5, -0.0, 1e999, "", " ", "x", "\ud800", "\0", "\x1b[2J",
    "Ж", "%s", "{x}", [], {}, [[]], [0, -1], {"a": {"b": 1}}, ["x"] * 3, *OUTSIDE,
]  # fmt: skip
HUGE_VALUES: list[Any] = [10**400, 2**63, 2**64 + 1, -(2**63), "9" * 5000]
"""Only where nothing is allocated by them: a model of 2**63 units may well be asked for."""
ODD_BYTES = [
    b"\xff\xfe",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b'"',
    b"{",
    b"]",
    b"\xc3",
    b"[" * 3000,
]

Damage = Callable[[random.Random, bytes], bytes]


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, set, drop, insert or double a few bytes, or cut the end off."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        if not damaged:
            return draw.choice(ODD_BYTES)
        place = draw.randrange(len(damaged))
        kind = draw.randrange(6)
        if kind == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            damaged[place] = draw.randrange(256)
        elif kind == 2:
            del damaged[place : place + draw.randint(1, 9)]
        elif kind == 3:
            damaged[place:place] = draw.randbytes(draw.randint(1, 9))
        elif kind == 4:
            damaged[place:place] = draw.choice(ODD_BYTES)
        else:
            damaged[place:place] = damaged[place : place + draw.randint(1, 60)]
    if damaged and draw.random() < 0.2:
        del damaged[draw.randrange(len(damaged)) :]
    return bytes(damaged)


def damage_value(draw: random.Random, value: Any, odd: list[Any]) -> Any:
    """Change one place of a JSON value: drop it, rename it, or put something odd there."""
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        if draw.random() < 0.55:
            return value | {key: damage_value(draw, value[key], odd)}
        rest = {name: item for name, item in value.items() if name != key}
        if draw.random() < 0.5:
            return rest
        name = draw.choice([f"{key}x", "__class__", "", "../x", "__metadata__"])
        return rest | {name: value[key]}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], damage_value(draw, value[place], odd), *value[place + 1 :]]
    return draw.choice(odd)


def json_damage(*, huge: bool = True) -> Damage:
    """Damage to a file of one JSON value.

    Args:
        huge: Put numbers there that no memory could follow.
    """
    odd = ODD_VALUES + (HUGE_VALUES if huge else [])

    def damage(draw: random.Random, data: bytes) -> bytes:
        if draw.random() < 0.35:
            return damage_bytes(draw, data)
        value = json.loads(data)
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            value = damage_value(draw, value, odd)
        return json.dumps(value).encode()

    return damage


def damage_lines(draw: random.Random, data: bytes) -> bytes:
    """Damage to one line of JSON Lines, or to their bytes."""
    lines = data.splitlines(keepends=True)
    if not lines or draw.random() < 0.3:
        return damage_bytes(draw, data)
    place = draw.randrange(len(lines))
    lines[place] = json_damage()(draw, lines[place]).rstrip(b"\n") + b"\n"
    if draw.random() < 0.2:
        lines.insert(place, draw.choice([b"\n", b"[]\n", b"nul", lines[place]]))
    return b"".join(lines)


def damage_safetensors(draw: random.Random, data: bytes) -> bytes:
    """Damage to the header of a safetensors file, or to its bytes."""
    if draw.random() < 0.35:
        return damage_bytes(draw, data)
    size = int.from_bytes(data[:8], "little")
    header = json_damage()(draw, data[8 : 8 + size])
    told = len(header) if draw.random() < 0.9 else draw.choice([0, 2**63, size, len(header) + 1])
    return told.to_bytes(8, "little") + header + data[8 + size :]


def damage_yaml(draw: random.Random, data: bytes) -> bytes:
    """Damage to the values of a YAML file, to its lines, or to its bytes."""
    chance = draw.random()
    if chance < 0.3:
        return damage_bytes(draw, data)
    if chance < 0.5:
        lines = data.splitlines(keepends=True)
        line = draw.choice(lines)
        odd = [
            b"\t", b"  ", b"- ", b"? ", b"&a *a ",
            b"!!python/object/apply:os.system [touch canary]",
            b"!!binary x", b"<<: *b", b"${oc.env:HOME}", b"${x}", b"{", b"a: b: c", b"--- ",
            b"!!float ",
        ]  # fmt: skip
        return data.replace(line, draw.choice(odd) + line if draw.random() < 0.5 else line * 2, 1)
    value = damage_value(draw, yaml.safe_load(data), [*ODD_VALUES, *HUGE_VALUES])
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def damage_csv(draw: random.Random, data: bytes) -> bytes:
    """Damage to a cell of a CSV file, or to its bytes."""
    if draw.random() < 0.5:
        return damage_bytes(draw, data)
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = draw.choice(["", '"', "a,b\n", "\0", "x" * 200])
    if draw.random() < 0.3:
        row.append("more")
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def damage_gzip(draw: random.Random, data: bytes) -> bytes:
    """Damage to what was packed, or to the packed bytes."""
    if draw.random() < 0.5:
        return damage_bytes(draw, data)
    return gzip.compress(damage_lines(draw, gzip.decompress(data)), mtime=0)
