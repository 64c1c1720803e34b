"""The Hugging Face hub: a repository's files, uploads, errors in one line.

All through huggingface_hub, which reads HF_ENDPOINT, HF_TOKEN and the stored login. No message
quotes a request, so none has the token.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import console

RepoType = Literal["model", "dataset"]
STALE = (".safetensors", ".safetensors.index.json", ".parquet", ".gguf")
"""Remote files of these kinds that are not published again are deleted: they would be loaded with
the new weights or rollouts. Others, such as files added by hand, stay."""
MAX_DIFF_BYTES = 200_000
"""Changed lines of larger text files are not shown."""


class Unreachable(UserError):
    """No answer from the hub."""


@dataclass(frozen=True)
class Remote:
    """A repository as the hub has it."""

    commit: str
    private: bool
    files: dict[str, RepoFile]


@dataclass(frozen=True)
class Change:
    """What publishing does to one file: "+" new, "~" changed, "-" deleted, "=" the same."""

    sign: Literal["+", "~", "-", "="]
    path: str
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.sign} {self.path} ({format_bytes(self.num_bytes)})"


class Hub:
    """The hub as one user sees it. Every method raises UserError in one line."""

    def __init__(self) -> None:
        if not console.is_terminal:
            disable_progress_bars()
        self._token = get_token()
        self._api = HfApi(token=self._token or False, library_name="r1pipe")

    def check_login(self) -> str:
        """The user's name. Raises UserError without a token that the hub accepts."""
        if self._token is None:
            raise UserError("no token for the hub: set HF_TOKEN, or log in with `hf auth login`")
        with one_line("the hub"):
            return self._api.whoami()["name"]

    def find_repo(self, repo_id: str, repo_type: RepoType) -> Remote | None:
        """None if there is none that this user may see."""
        with one_line(repo_id):
            try:
                info = self._api.repo_info(repo_id, repo_type=repo_type)
            except RepositoryNotFoundError:
                return None
            files = self._api.list_repo_tree(
                repo_id, recursive=True, repo_type=repo_type, revision=info.sha
            )
            by_path = {file.path: file for file in files if isinstance(file, RepoFile)}
        return Remote(info.sha, bool(info.private), by_path)

    def find_license(self, repo_id: str, repo_type: RepoType) -> str | None:
        """From the repository's card; None if it has none or cannot be read."""
        try:
            with one_line(repo_id):
                info = self._api.repo_info(repo_id, repo_type=repo_type)
        except UserError:
            return None
        license = (info.card_data or {}).get("license")
        return license[0] if isinstance(license, list) else license

    def read_text(self, repo_id: str, repo_type: RepoType, path: str, remote: Remote) -> str:
        with one_line(f"{repo_id}/{path}"):
            file = self._api.hf_hub_download(
                repo_id, path, repo_type=repo_type, revision=remote.commit
            )
        return Path(file).read_text(encoding="utf-8", errors="replace")

    def read_texts(self, repo_id: str, pattern: re.Pattern[str]) -> dict[str, str]:
        """Texts of a model's files whose whole name matches, by name; none without a repository."""
        remote = self.find_repo(repo_id, "model")
        names = [name for name in (remote.files if remote else ()) if pattern.fullmatch(name)]
        return {name: self.read_text(repo_id, "model", name, remote) for name in names}

    def create_repo(self, repo_id: str, repo_type: RepoType, private: bool) -> Remote:
        with one_line(repo_id):
            self._api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        remote = self.find_repo(repo_id, repo_type)
        if remote is None:
            raise UserError(f"{repo_id}: was created but cannot be read: check the token's rights")
        return remote

    def upload(
        self,
        folder: Path,
        changes: list[Change],
        repo_id: str,
        repo_type: RepoType,
        remote: Remote,
        message: str,
    ) -> str:
        """Upload all changes as one commit. Returns its address.

        Large files are uploaded before the commit and kept by the hub: after an interruption the
        same call uploads the rest. Raises UserError if the repository has changed since `remote`
        was read.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(change.path, folder / change.path)
            for change in changes
            if change.sign in "+~"
        ]
        operations += [CommitOperationDelete(c.path) for c in changes if c.sign == "-"]
        with one_line(repo_id):
            return self._api.create_commit(
                repo_id,
                operations,
                repo_type=repo_type,
                commit_message=message,
                parent_commit=remote.commit,
            ).commit_url

    def make_public(self, repo_id: str, repo_type: RepoType) -> None:
        with one_line(repo_id):
            self._api.update_repo_settings(repo_id, repo_type=repo_type, private=False)

    def add_to_collection(
        self, title: str, repo_id: str, repo_type: RepoType, private: bool
    ) -> str:
        """The address of the collection with this title, created if there is none."""
        with one_line(f'collection "{title}"'):
            collection = self._api.create_collection(
                title, namespace=repo_id.split("/")[0], private=private, exists_ok=True
            )
            self._api.add_collection_item(collection.slug, repo_id, repo_type, exists_ok=True)
            return collection.url


def check_repo_id(repo_id: str) -> None:
    """Raises UserError unless it is user/name, as the hub allows them."""
    try:
        validate_repo_id(repo_id)
        correct = repo_id.count("/") == 1
    except HFValidationError:
        correct = False
    if not correct:
        raise UserError(f'--repo "{repo_id}": a repository is user/name: letters, digits, - _ .')


def list_changes(folder: Path, remote: Remote | None) -> list[Change]:
    """What publishing the folder does to each file of the repository (None: a new one)."""
    files = remote.files if remote else {}
    changes = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        there = files.get(path)
        sign = "+" if there is None else "=" if is_same(file, there) else "~"
        changes.append(Change(sign, path, file.stat().st_size))
    written = {change.path for change in changes}
    for path, there in files.items():
        if path not in written and path.endswith(STALE):
            changes.append(Change("-", path, there.size))
    return changes


def is_same(file: Path, there: RepoFile) -> bool:
    """By size and hash: SHA-256 of a large file, else git's blob id."""
    size = file.stat().st_size
    if size != there.size:
        return False
    with file.open("rb") as opened:
        if there.lfs is not None:
            return hashlib.file_digest(opened, "sha256").hexdigest() == there.lfs.sha256
        digest = hashlib.sha1(b"blob %d\0" % size)
        digest.update(opened.read())
    return digest.hexdigest() == there.blob_id


ANY_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def holds_token(text: str) -> bool:
    """Whether the text holds this user's token, or what looks like a token."""
    token = get_token()
    return bool(ANY_TOKEN.search(text)) or (token is not None and token in text)


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


AGAIN = "run the same command again to resume"


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError: `what`, the cause, what to do."""
    try:
        yield
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"{what}: the hub has no such repository, or the token may not see it "
            f"({error.response.status_code})"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as e:
        raise explain(what, e) from None


def explain(what: str, error: BaseException) -> UserError:
    """The line for an error; huggingface_hub wraps those of uploads in a RuntimeError."""
    cause: BaseException | None = error
    if isinstance(error, RuntimeError):
        cause = error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return Unreachable(f"{what}: HF_HUB_OFFLINE is set: unset it to reach the hub")
    if isinstance(cause, HfHubHTTPError):
        return UserError(f"{what}: {explain_status(cause)}")
    if isinstance(cause, httpx.HTTPError):
        return Unreachable(f"{what}: the hub cannot be reached ({type(cause).__name__}); {AGAIN}")
    # A card that the hub does not accept, for instance.
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    return UserError(f"{what}: {hide_token(' '.join(lines)) or type(error).__name__}")


def hide_token(text: str) -> str:
    """A server may repeat what it was sent."""
    token = get_token()
    text = text.replace(token, "<token>") if token else text
    return ANY_TOKEN.sub("<token>", text)


def explain_status(error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, error.server_message or ""
    said = f": {hide_token(' '.join(said.split()))}" if said else ""
    if status == 401:
        return "the hub rejects the token (401): check HF_TOKEN, which may have expired"
    if status == 403:
        return f"the token may not do this (403{said}): it needs write access"
    if status in (409, 412):
        return f"the repository was changed meanwhile ({status}{said}): look, and publish again"
    if status == 429:
        return f"too many requests (429); wait a few minutes: {AGAIN}"
    if status >= 500:
        return f"the hub fails ({status}{said}); {AGAIN}"
    return f"the hub rejects this ({status}{said})"
