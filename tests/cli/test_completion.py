"""What the shells propose, asked by their own protocol."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import preloaded
import pytest

ASK = "import sys; from wegeft_cli.cli.app import main; sys.argv = ['wegeft']; main()"
SHELLS = ("bash", "zsh", "fish")


def propose(shell: str, words: str, folder: Path) -> str:
    """Return what completion prints for a line that ends within its last word."""
    environment = {
        **os.environ,
        "_WEGEFT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = preloaded.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "expected", "other"),
    [
        ("wegeft tr", "train", "merge"),
        ("wegeft train --over", "--overwrite", "--resume"),
        ("wegeft train llama_math", "llama_math10k_lora", "quickstart"),
        ("wegeft train my", "my.yaml", "notes.txt"),
        ("wegeft validate quickstart train.learn", "train.learning_rate=", "adapter.r="),
        ("wegeft eval --task gs", "gsm8k", "boolq"),
        ("wegeft eval --protocol meta", "metamath", "llm_adapters"),
        ("wegeft recipes copy quick", "quickstart", "vit_digits"),
    ],
)
def test_words_are_completed(
    shell: str, words: str, expected: str, other: str, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").touch()
    (tmp_path / "my.notes.txt").touch()
    proposed = propose(shell, words, tmp_path)
    assert expected in proposed
    assert other not in proposed


def test_choices_follow_a_key(tmp_path: Path) -> None:
    proposed = propose("fish", "wegeft train quickstart adapter.side=", tmp_path).split()
    assert proposed == ["adapter.side=input", "adapter.side=output"]
    assert propose("zsh", "wegeft train quickstart nonsense[=", tmp_path).strip() in (
        "",
        "_files",
    )


def test_folders_lead_to_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "deep.yaml").touch()
    (tmp_path / ".hidden.yaml").touch()
    assert "mine/" in propose("fish", "wegeft train m", tmp_path).split()
    assert propose("fish", "wegeft train mine/", tmp_path).split() == ["mine/deep.yaml"]
    assert ".hidden.yaml" not in propose("fish", "wegeft train ", tmp_path)
