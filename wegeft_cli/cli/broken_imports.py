"""The message for packages that cannot be imported, such as versions that do not fit together."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from wegeft_cli.errors import UserError

_PACKAGES = ("transformers", "tokenizers", "huggingface_hub", "torch", "accelerate", "safetensors")
_REQUIRED = re.compile(r"([A-Za-z0-9_.-]+)((?:[<>=!~]=?[^,\s]+,?)+) is required")


def describe_import_error(error: ImportError) -> UserError | None:
    """Return the fault for a package that cannot be imported; None for a module of this one."""
    name = (error.name or "").partition(".")[0]
    if name == "wegeft_cli":
        return None
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    required = _REQUIRED.search(reason)
    if required is not None:
        wanted = f"'{required[1]}{required[2].rstrip(',')}'"
    elif isinstance(error, ModuleNotFoundError) and name:
        wanted = name
    else:
        wanted = f"--upgrade {' '.join(dict.fromkeys(filter(None, ('transformers', name))))}"
    return UserError(
        f"the installed packages do not fit together: {reason} ({_list_versions()})",
        hint=f"pip install {wanted}",
    )


def _list_versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
