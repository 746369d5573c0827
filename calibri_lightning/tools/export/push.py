"""An exported folder on the Hub: in a new repository, private until all is there and unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibri_lightning.adapters.loading import HUB_ID
from calibri_lightning.backbones.loading import first_line
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Target:
    """A repository that is to be made."""

    repo_id: str
    """owner/name"""
    public: bool = False

    def __post_init__(self) -> None:
        """Checks the name.

        Raises:
            UserError: If it is none.
        """
        if not HUB_ID.fullmatch(self.repo_id):
            raise UserError(f"--push is {self.repo_id!r}; it must be OWNER/NAME, a repository of the Hub.")


def check_target(target: Target, api: HfApi) -> None:
    """Checks that the Hub will take the upload, before hours of work are done.

    Args:
        target: The repository.
        api: The Hub, with the token that `hf auth login` keeps.

    Raises:
        UserError: If nobody is logged in, the account may not write there, the Hub cannot be reached, or the repository
            exists.
    """
    try:
        account = api.whoami()
        exists = api.repo_exists(target.repo_id, repo_type="model")
    # No token, a token that expired, no network: each has its own class.
    except Exception as error:
        raise UserError(
            f"The Hub does not let this account push to {target.repo_id} ({first_line(error)}). Log in with `hf auth "
            "login` and a token that may write, check the network, or leave --push out."
        ) from error
    _check_account(target, account)
    if exists:
        raise UserError(
            f"The repository {target.repo_id} exists, and a push makes a new one: nothing that others may use is "
            "replaced by accident. Choose another name; or leave --push out and upload the folder with `hf upload`."
        )


def push(folder: Path, target: Target, api: HfApi, message: str) -> str:
    """Makes a private repository, uploads the folder in one commit, and then makes it public where that was asked for.

    Args:
        folder: The exported folder.
        target: The repository.
        api: The Hub.
        message: What the commit says.

    Returns:
        The repository's address.

    Raises:
        UserError: If the Hub refuses; the folder stays, and nobody else has seen a part of it.
    """
    try:
        made = api.create_repo(target.repo_id, repo_type="model", private=True, exist_ok=False)
    except Exception as error:
        raise UserError(
            f"The folder {folder} is whole, but the repository {target.repo_id} could not be made "
            f"({first_line(error)}). Go on with: hf upload {target.repo_id} {folder} . --private"
        ) from error
    try:
        api.upload_folder(repo_id=target.repo_id, folder_path=folder, repo_type="model", commit_message=message)
    except Exception as error:
        raise UserError(
            f"The folder {folder} is whole, but could not be uploaded ({first_line(error)}). The repository "
            f"{target.repo_id} was made, is private and empty. Go on with: hf upload {target.repo_id} {folder} ."
        ) from error
    if target.public:
        _publish(target, api)
    return str(made)


def _publish(target: Target, api: HfApi) -> None:
    try:
        api.update_repo_settings(target.repo_id, repo_type="model", private=False)
    except Exception as error:
        raise UserError(
            f"All is uploaded to {target.repo_id}, but the repository could not be made public ({first_line(error)}). "
            "Change that in its settings on the Hub."
        ) from error


def _check_account(target: Target, account: Mapping[str, Any]) -> None:
    """Compares with what the Hub says of the account; what it leaves out is for `create_repo` to find."""
    owner = target.repo_id.partition("/")[0]
    names = [account.get("name"), *(group.get("name") for group in account.get("orgs") or ())]
    if owner.casefold() not in [str(name).casefold() for name in names]:
        raise UserError(
            f"--push is {target.repo_id}, and this account of the Hub is {names[0]}, in the organisations "
            f"{', '.join(map(str, names[1:])) or 'none'}. Choose one of these as OWNER, or log in with another account."
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(
            f"The token of this account may read alone, and --push {target.repo_id} writes. Log in with `hf auth "
            "login` and a token that may write."
        )
