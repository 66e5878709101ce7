"""Versions, git revision and platform, as run.json and result files record them."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

from wegeft_cli.version import VERSION

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "peft")


def describe_environment() -> dict[str, Any]:
    """Return versions of packages, git revision of the working directory, and platform."""
    versions = {"wegeft-cli": VERSION, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git_revision": _git_revision(),
        "platform": platform.platform(),
    }


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
