"""The Hugging Face hub: the licence of a base, a file that is read from there, and an export that is pushed there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from steer_heal.config import PACKAGED_GGUF, UserError, hub_id
from steer_heal.model.gguf_file import opened, value
from steer_heal.model.loading import gguf_file
from steer_heal.report.card import Licence

SECONDS = 10  # that a licence is waited for
LOGIN = "run `hf auth login` with a token that may write"
ANSWERS = {
    401: f"the hub does not take the token (401): {LOGIN}",
    403: f"the token may not write there (403): {LOGIN}, or choose another owner",
    404: "there is no such place at the hub, or the token may not see it (404)",
}
# What the client raises beside HTTPError: for a line that is cut, an answer that is no JSON, a part that is not taken.
OTHERS = (OSError, ValueError, KeyError, RuntimeError)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn whatever keeps the hub from answering inside the block into a UserError that begins with `what`."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{what}: no token of the hub is on this machine: {LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"{what}: {ANSWERS.get(status, f'the hub answered {status}: try again later')}") from error
    except (HTTPError, *OTHERS) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: the hub could not be reached, or broke off ({said}): try again") from error


def licence_of(path: str) -> Licence | None:
    """The licence of a run's model, from its card or its .gguf file; None where it is not found."""
    if path in PACKAGED_GGUF or path.lower().endswith(".gguf"):
        named = value(opened(gguf_file(path), "the base"), "general.license")
        return Licence(named) if named else None
    card, front = Path(path) / "README.md", None
    try:
        if card.is_file():
            front = metadata_load(card)
        elif hub_id(path):
            front = HfApi().model_info(path, timeout=SECONDS).card_data
    except (HTTPError, YAMLError, *OTHERS):  # no network, no card, or one that cannot be read
        return None
    if front is None or not isinstance(front.get("license"), str):
        return None
    return Licence(*(front.get(key) for key in ("license", "license_name", "license_link")))


def fetched(repo: str, name: str) -> Path:
    """A file of a model at the hub, on this machine. Raises UserError when it cannot be had."""
    with asking(f"{name} of {repo!r}"):
        return Path(hf_hub_download(repo, name))


def require_free(repo: str, public: bool) -> None:
    """Raise UserError, before the work, for a name at the hub that nothing can be pushed to."""
    what, api = f"--push {repo!r}", HfApi()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{what} is no name at the hub ({error})") from error
    if "/" not in repo:
        raise UserError(f"{what}: give USER/NAME, the owner and the model's new name at the hub")
    with asking(what):
        api.whoami()
        try:
            there = api.model_info(repo)
        except RepositoryNotFoundError:
            return
    if any(file.rfilename != ".gitattributes" for file in there.siblings or ()):
        raise UserError(f"{what}: it has files already: choose a new name")
    if bool(there.private) == public:
        said, mend = ("private", "leave --public out") if public else ("public", "say so with --public")
        raise UserError(f"{what}: it is {said}: choose a new name, or {mend}")


def push(repo: str, files: dict[str, Path], public: bool) -> str:
    """Put files into a model of the hub in one commit, all of them or none; return its address."""
    api = HfApi()
    parts = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    with asking(f"--push {repo!r}: nothing was published"):
        api.create_repo(repo, private=not public, exist_ok=True)
        api.create_commit(repo, parts, commit_message="Exported by steer-heal")
    return f"{api.endpoint}/{repo}"
