"""The hub's local cache, and whether the hub can be reached."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants


def find_snapshot(hub_id: str) -> Path | None:
    """A model's folder in the hub's cache; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def find_revision(files: dict[str, Path]) -> str | None:
    """Commit of a model in the hub's cache: the name of its snapshot folder."""
    folder = next((path.parent for path in files.values()), Path())
    return folder.name if folder.parent.name == "snapshots" else None


def reaches_hub() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True
