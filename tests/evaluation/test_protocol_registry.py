from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text import protocol_registry, protocols
from wegeft_cli.evaluation.text.loading import TEST_SETS
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS, find_protocol

NEW_PROTOCOL = """
from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule

RULE = Rule("alpaca", parts.FREE, parts.new_text_only, parts.number)
PROTOCOLS = (EvalProtocol("plain", "", {"number": RULE}),)
"""


def test_one_new_file_adds_a_protocol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a_new_protocol.py").write_text(NEW_PROTOCOL)
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(tmp_path)])
    found = protocol_registry.load_protocols()
    assert list(found) == [*PROTOCOLS, "plain"]
    monkeypatch.setattr(protocol_registry, "PROTOCOLS", found)
    assert find_protocol("plain", TEST_SETS["gsm8k"]) is found["plain"]
    with pytest.raises(UserError, match="does not score"):
        find_protocol("plain", TEST_SETS["boolq"])


def test_the_registry_imports_no_torch() -> None:
    code = (
        "import sys; import wegeft_cli.evaluation.text.protocol_registry; "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
