"""The target of --push-to-hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.publishing.hub import HubTarget


def hub_target(repo_id: str | None, is_public: bool) -> HubTarget | None:
    """Return the target of --push-to-hub, or None; raise `UserError` if --public is alone."""
    if repo_id is None:
        if is_public:
            message = "requires --push-to-hub"
            raise UserError(message, key="--public", hint="set the repository, or remove --public")
        return None
    from wegeft_cli.publishing.hub import HubTarget

    return HubTarget(repo_id, is_public)
