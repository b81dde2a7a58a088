"""Folders on the Hugging Face hub, through huggingface_hub."""

import glob
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

Held = TypeVar("Held", bound="OnHub")


class OnHub:
    """What can be written as a folder can be pushed to the hub, and opened from it.

    Tested by huggingface_hub's own client against a server of the tests that answers as the hub's
    API does (a repository is made, files are committed, listed and served), and offline from
    huggingface_hub's cache; not against huggingface.co.
    """

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write it into a new folder."""

    @classmethod
    @abstractmethod
    def _opened(cls: type[Held], folder: Path) -> Held:
        """Open what `save` wrote."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        path_in_repo: str = "",
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload with saefeat",
    ) -> str:
        """Commit the files that `save` writes to a model repository of the Hugging Face hub.

        Log in first (`hf auth login`, or the environment variable HF_TOKEN).

        Args:
            repo_id: "user/name"; the repository is made if there is none.
            path_in_repo: The folder in it; "" for its root. Files there are overwritten.
            private: Whether a new repository is private; None for the account's default.
            revision: The branch, which must exist; None for the main one.
            commit_message: What the commit says.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The hub refuses, as without a login.
            ValueError: A weight is not finite.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="saefeat")
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save(Path(folder) / "saved")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=saved,
                path_in_repo=path_in_repo,
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit.commit_url)

    @classmethod
    def from_hub(
        cls: type[Held], repo_id: str, *, path_in_repo: str = "", revision: str | None = None
    ) -> Held:
        """Open what lies in a repository of the Hugging Face hub.

        Files are kept in huggingface_hub's cache, which also serves without a connection
        (HF_HUB_OFFLINE=1).

        Args:
            repo_id: "user/name".
            path_in_repo: The folder in it; "" for its root.
            revision: A branch, tag or commit; None for the main branch.

        Raises:
            FileNotFoundError: The folder holds no dictionary, or there is no connection and it
                is not in the cache.
            huggingface_hub.errors.RepositoryNotFoundError: There is no such repository.
            ValueError: A file is damaged, or of a kind that is not known.
        """
        from huggingface_hub import snapshot_download

        path_in_repo = path_in_repo.strip("/")
        # In these patterns * crosses slashes.
        patterns = f"{glob.escape(path_in_repo)}/*" if path_in_repo else None
        root = snapshot_download(
            repo_id, revision=revision, allow_patterns=patterns, library_name="saefeat"
        )
        return cls._opened(Path(root) / path_in_repo)
