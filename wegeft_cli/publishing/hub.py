"""Upload a folder to a hub, with checks before the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.reporter import Reporter

_KEY = "--push-to-hub"
_ENDPOINT = "https://huggingface.co"
_DENIED = (401, 403)


@dataclass(frozen=True)
class HubTarget:
    """A model repository on a hub.

    Args:
        repo_id: `name` or `owner/name`.
        is_public: Whether a repository that is created is public.
    """

    repo_id: str
    is_public: bool = False

    def check(self) -> None:
        """Raise the errors that would stop the upload, before hours of work.

        UserError: the name is invalid, the hub is switched off, or the user is not logged in.
        MachineError: the hub cannot be reached.
        """
        from huggingface_hub import constants, utils
        from huggingface_hub.errors import HFValidationError

        checks: Any = utils
        try:
            checks.validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(
                f"{self.repo_id!r} is no name of a repository",
                key=_KEY,
                hint=f"write owner/name: {str(error).splitlines()[0]}",
            ) from error
        if constants.is_offline_mode():
            raise UserError(
                "the hub is switched off (HF_HUB_OFFLINE)", key=_KEY, hint="unset that variable"
            )
        with _hub_errors(self.repo_id):
            _client().whoami()


def publish(folder: Path, target: HubTarget, reporter: Reporter) -> str:
    """Upload a folder as one commit, create a missing repository, and return its address."""
    reporter.note(f"uploading {folder} to {target.repo_id}")
    api = _client()
    with _hub_errors(target.repo_id, folder):
        repo = api.create_repo(target.repo_id, private=not target.is_public, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=str(folder),
            commit_message="Upload with wegeft-cli",
        )
        return str(repo)


def _client() -> Any:
    from huggingface_hub import HfApi, utils

    bars: Any = utils
    bars.disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", _ENDPOINT), library_name="wegeft-cli")


@contextmanager
def _hub_errors(repo_id: str, folder: Path | None = None) -> Iterator[None]:
    """Translate the errors of the hub's client; `folder` is the folder of the upload."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # The hub's client has changed its HTTP library; it exports the error's class.
    http_error: Any = vars(errors)["HTTPError"]

    kept = f"{folder} is whole; try again: hf upload {repo_id} {folder}"
    try:
        yield
    except (http_error, OSError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, LocalTokenNotFoundError) or status in _DENIED:
            hint = "log in with a token that may write: hf auth login, or set HF_TOKEN"
            raise UserError(
                f"the hub does not let you write {repo_id!r}: {reason}",
                key=_KEY,
                hint=f"{hint}; {kept}" if folder else hint,
            ) from error
        raise MachineError(
            f"the hub failed for {repo_id!r}: {reason}",
            key=_KEY,
            hint=kept if folder else "check the network; nothing was done yet",
        ) from error
