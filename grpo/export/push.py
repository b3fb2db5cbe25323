"""Push: an exported folder onto the hub. Knows nothing of what is in it; a token is used and never shown.

A repository is private unless --public is given. One that is there already gets a commit more; if it is public and
--public is not given it is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from grpo.errors import UserError, in_words

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


class Hub:
    """A repository to push to.

    Raises:
        UserError: it cannot be pushed to, for what reason and what to do.
    """

    def __init__(self, repository: str, is_public: bool):
        if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
            raise UserError(f"--push is {repository!r}. It takes OWNER/NAME, of letters, digits, points, - and _.")
        self.repository, self.is_public = repository, is_public
        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self.api = HfApi(self.endpoint)

    def check(self) -> None:
        """To be asked before anything is made: somebody is logged in, and the repository is not open to all unasked.

        Raises:
            UserError: it cannot be pushed to.
        """
        with self._in_words():
            self.api.whoami()
            try:
                is_private = self.api.repo_info(self.repository).private
            except RepositoryNotFoundError:
                return
        if is_private is False and not self.is_public:
            raise UserError(
                f"{self.repository} is there already, and public. Give --public if everybody may have this, or another "
                "name."
            )

    def push(self, folder: Path, message: str) -> str:
        """Upload what is in a folder; where it can be seen.

        Raises:
            UserError: the hub refuses it, or cannot be reached; the folder stays.
        """
        with self._in_words():
            self.api.create_repo(self.repository, private=not self.is_public, exist_ok=True)
            self.api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message=message)
        return f"{self.endpoint}/{self.repository}"

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        where = f"--push {self.repository}"
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise UserError(
                f"{where} needs the network, and HF_HUB_OFFLINE is set. Unset it, or push later."
            ) from error
        except LocalTokenNotFoundError as error:
            raise UserError(
                f"{where} needs a login, and there is none here. `hf auth login` asks for a token that may write (or "
                "set HF_TOKEN)."
            ) from error
        except HfHubHTTPError as error:
            code = getattr(error.response, "status_code", None)
            why = {401: "the token is not valid", 403: "the token may not write there"}.get(code or 0, _said(error))
            raise UserError(
                f"{where} was refused by {self.endpoint}: {why}. `hf auth whoami` says who you are there; what is "
                "exported stays and can be pushed later by `hf upload`."
            ) from error
        except Exception as error:  # of sockets, of TLS, of a proxy: the client's and its libraries' own classes
            raise UserError(
                f"{where} could not reach {self.endpoint}: {_said(error)}. Try again; what is exported stays, and `hf "
                "upload` pushes it too."
            ) from error


def _said(error: Exception) -> str:
    """What went wrong in one line, without the token."""
    text = " ".join(in_words(error).split())[:300]
    token = get_token()
    return text.replace(token, "***") if token else text
