"""Plain values travel between two processes that do not trust each other.

A frame is four bytes of length, big-endian, and so many bytes of JSON. Values that JSON does not
have travel as `{"tag": ..., "value": ...}`; reading one never runs code that the sender chose.
"""

from __future__ import annotations

import json
import math
import socket
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 1 << 20
"""Longest message; the longest answer in HumanEval is shorter by far."""

_HEADER_BYTES = 4


class CarryError(Exception):
    """A message that is too long or no message at all."""


class LinkClosedError(Exception):
    """The other process has closed its end."""


class Opaque:
    """Stands for a value that cannot travel; equal to nothing but itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} object>"


def encode_value(value: Any) -> Any:
    """A value as JSON can hold it.

    Subclasses travel as the built-in type that they extend; a value of any other type becomes
    `Opaque` on the other side.

    Args:
        value: Any Python value.

    Returns:
        A value for `json.dumps`.

    Raises:
        RecursionError: If it is nested too deeply.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # In hexadecimal: Python refuses to read very long decimal numbers.
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
    """What `encode_value` was given.

    Args:
        value: What `json.loads` gave.

    Returns:
        The value.

    Raises:
        CarryError: If nothing encodes to that.
    """
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
    """Send one message.

    Args:
        link: A connected stream socket.
        message: A JSON value.

    Raises:
        CarryError: If it is too long.
        LinkClosedError: If nobody reads it.
    """
    content = json.dumps(message).encode("ascii")
    if len(content) > MAX_FRAME_BYTES:
        raise CarryError(f"a message of {len(content)} bytes; at most {MAX_FRAME_BYTES} may travel")
    try:
        link.sendall(len(content).to_bytes(_HEADER_BYTES, "big") + content)
    except OSError as error:
        raise LinkClosedError from error


def receive_frame(link: socket.socket) -> Any:
    """Wait for one message.

    Args:
        link: A connected stream socket.

    Returns:
        A JSON value.

    Raises:
        CarryError: If what comes is no message, or too long.
        LinkClosedError: If nothing more comes.
    """
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
