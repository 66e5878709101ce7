"""Transfer of plain values between two processes that do not trust each other.

A frame is a four-byte big-endian length and that many bytes of JSON. Values without a JSON form are
encoded as `{"tag": ..., "value": ...}`. Decoding never runs code of the sender.
"""

from __future__ import annotations

import json
import math
import socket
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 1 << 20
"""Longest message; the longest answer in HumanEval is much shorter."""

_HEADER_BYTES = 4


class CarryError(Exception):
    """A message that is too long or malformed."""


class LinkClosedError(Exception):
    """The other process has closed its end."""


class Opaque:
    """Placeholder of a value that cannot be transferred; equal only to itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} object>"


def encode_value(value: Any) -> Any:
    """Return a Python value as JSON values.

    Subclasses are encoded as the built-in type that they extend; a value of any other type is
    decoded as `Opaque`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Hexadecimal, because Python rejects very long decimal numbers.
        return {"tag": "int", "value": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"tag": "float", "value": repr(value)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, tuple | set | frozenset):
        tag = next(kind for kind in (tuple, set, frozenset) if isinstance(value, kind)).__name__
        return {"tag": tag, "value": [encode_value(item) for item in value]}
    if isinstance(value, dict):
        pairs = [[encode_value(key), encode_value(item)] for key, item in value.items()]
        return {"tag": "dict", "value": pairs}
    if isinstance(value, complex):
        return {"tag": "complex", "value": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"tag": type(value).__name__, "value": value.hex()}
    if isinstance(value, Fraction | Decimal):
        return {"tag": type(value).__name__, "value": str(value)}
    return {"tag": "opaque", "value": type(value).__name__}


def decode_value(value: Any) -> Any:
    """Return the value that `encode_value` encoded; raise CarryError if there is none."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        return _decode_tagged(value["tag"], value["value"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CarryError(f"not a value: {error}") from error


def _decode_tagged(tag: str, value: Any) -> Any:
    if tag == "int":
        return int(value, 16)
    if tag == "float":
        return float(value)
    if tag == "complex":
        return complex(float(value[0]), float(value[1]))
    if tag == "dict":
        return {decode_value(key): decode_value(item) for key, item in value}
    if tag == "opaque":
        return Opaque(str(value))
    if tag in ("bytes", "bytearray"):
        return bytes.fromhex(value) if tag == "bytes" else bytearray.fromhex(value)
    if tag in ("Fraction", "Decimal"):
        return Fraction(value) if tag == "Fraction" else Decimal(value)
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[tag](decode_value(item) for item in value)


def send_frame(link: socket.socket, message: Any) -> None:
    """Send one JSON value; raise CarryError if it is too long, LinkClosedError if unread."""
    content = json.dumps(message).encode("ascii")
    if len(content) > MAX_FRAME_BYTES:
        raise CarryError(f"a message of {len(content)} bytes; at most {MAX_FRAME_BYTES} may travel")
    try:
        link.sendall(len(content).to_bytes(_HEADER_BYTES, "big") + content)
    except OSError as error:
        raise LinkClosedError from error


def receive_frame(link: socket.socket) -> Any:
    """Wait for one JSON value; raise CarryError if it is malformed, LinkClosedError at the end."""
    length = int.from_bytes(_receive_exactly(link, _HEADER_BYTES), "big")
    if length > MAX_FRAME_BYTES:
        raise CarryError(f"a message of {length} bytes; at most {MAX_FRAME_BYTES} may travel")
    try:
        return json.loads(_receive_exactly(link, length))
    except (ValueError, RecursionError) as error:
        raise CarryError(f"not a message: {type(error).__name__}") from error


def _receive_exactly(link: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        try:
            part = link.recv(length - len(content))
        except OSError as error:
            raise LinkClosedError from error
        if not part:
            raise LinkClosedError
        content += part
    return bytes(content)
