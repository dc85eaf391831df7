"""Upload a folder to the Hugging Face hub: a call of huggingface_hub whose errors become FinetuneErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import EnvironmentFaultError, InternalError, UsageError
from pretrained.hub import offline_by_environment

_REFUSALS = {
    401: (
        "the request is not authenticated",
        "Set HF_TOKEN to a token with write access, or log in with `hf auth login`.",
    ),
    403: (
        "the token has no write access to it",
        "Use a token with write access, and your own name or organisation.",
    ),
    404: (
        "the repository or its owner was not found",
        "Check the name before the slash: your own, or an organisation's.",
    ),
}


@dataclass(frozen=True)
class Pushed:
    """The result of an upload.

    Attributes:
        repo_id: ``OWNER/NAME``.
        url: address of the repository.
        commit: hash of the uploaded commit.
    """

    repo_id: str
    url: str
    commit: str


def check_push(repo_id: str) -> None:
    """Check the repository name, the network access and the token before anything is computed.

    Raises:
        UsageError: ``repo_id`` is invalid.
        EnvironmentFaultError: offline mode is on, or the token is malformed.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        found = f"{repo_id[:100]!r} is not a valid name of a hub repository"
        raise UsageError("finetune push", found, "Write ORG/NAME.") from None
    if offline_by_environment():
        found = "offline mode is on (HF_HUB_OFFLINE)"
        raise EnvironmentFaultError(f"pushing {repo_id}", found, "Unset it to use the network.")
    if not (get_token() or "").isascii():
        found = "the token (HF_TOKEN, or of `hf auth login`) contains a character that is not ASCII"
        raise EnvironmentFaultError(f"pushing {repo_id}", found, "Copy the token again from the hub's page.")


def push_folder(folder: Path, repo_id: str, private: bool) -> Pushed:
    """Create the repository if it does not exist, and upload a folder in one commit.

    huggingface_hub itself reads the token (HF_TOKEN or ``hf auth login``) and the address (HF_ENDPOINT).

    Raises:
        EnvironmentFaultError: there is no network, or the hub refuses.
        InternalError: the hub refuses the model card.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="finetune")
    with _translated(f"pushing to {api.endpoint}/{repo_id}"):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message="Upload a model with finetune"
        )
    return Pushed(created.repo_id, str(created), done.oid)


@contextmanager
def _translated(asked: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()  # finetune's display shows the progress
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        why, fix = _REFUSALS.get(status, (error.server_message or "no reason was given", "Try again later."))
        raise EnvironmentFaultError(asked, f"the hub refused ({status}): {why}", fix) from None
    except ValueError as error:  # the client's error for a model card that the hub refuses
        reason = " ".join(str(error).split())[:300]
        fix = "Please report this with the README.md of `finetune export`."
        raise InternalError(asked, f"the hub refused the model card ({reason})", fix) from None
    except (OSError, RuntimeError) as error:
        raise _no_answer(asked, error) from None
    except Exception as error:  # the client's error classes change with every release
        if not _is_transport_error(error):
            raise
        raise _no_answer(asked, error) from None
    finally:
        if not silent:
            enable_progress_bars()


def _is_transport_error(error: Exception) -> bool:
    """Return whether an HTTP library raised it (the hub's client has used several, such as ``httpx2``)."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _no_answer(asked: str, error: Exception) -> EnvironmentFaultError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    fix = "Check the network and HF_ENDPOINT, and give the same command again."
    return EnvironmentFaultError(asked, f"the hub gave no answer ({reason})", fix)
