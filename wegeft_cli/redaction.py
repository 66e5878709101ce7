"""Mask secrets in texts that leave the machine."""

from __future__ import annotations

import os
import re

_SECRET_NAME = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
_LEAST_SECRET = 6
"""Shorter values of the environment (`1`, `true`) would be found everywhere."""
_URL_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def mask_secrets(text: str) -> str:
    """Replace the secrets of the environment, and users in web addresses, by `***`."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET:
            text = text.replace(value, "***")
    return _URL_USER.sub("***", text)
