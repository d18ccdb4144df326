"""Pushing a bundle to the Hub, now or later, and checkpoints in the background.

    python -m ballad_hf.hub.push outputs/digits someone/digits --private

The local folder is only read: whatever the network does, the result stays.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .layout import LAYOUT, check_bundle
from .private_paths import config_without_private_paths, without_private_paths
from .remote_code import code_files, config_with_code


logger = logging.get_logger(__name__)

CHECKPOINT_IN_REPO = "last-checkpoint"
# HTTPError is that of the library which the installed client speaks through, httpx or httpx2; the client raises a bare
# RuntimeError for a large file that it could not send.
_FAILURES = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError)


class PushError(RuntimeError):
    """The Hub did not take a bundle. The message says why, that the folder is whole, and how to push it later."""


def push_bundle(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    with_code: bool = False,
    revision: str | None = None,
    commit_message: str = "A Ballad and what tells of it",
) -> RepoUrl:
    """Put a bundle's files, and no others of its folder, into a Hub repository; call it on the main process alone.

    The repository is made where it does not exist. Everything but the card goes up in one commit, then the card:
    nobody reads of a model that is not there yet. Weights of an earlier push under other names are removed. Absolute
    paths in what tells the run's arguments are cut to their last part.

    Args:
        folder: that `save_bundle` wrote; it is not changed.
        repo_id: `owner/name`, or `name` for one of your own.
        private: `True` for a private repository, and nothing goes up where one of that name is public already.
            `None` for the account's default.
        token: of the Hub, with the right to write; default: the one of `hf auth login` or of `HF_TOKEN`.
        with_code: put the model's code there too; then it loads with `trust_remote_code=True` where this package is
            not installed.
        revision: branch to push to, which must exist; default: the main one.
        commit_message: of the commit.

    Returns:
        The repository's address, a string.

    Raises:
        FileNotFoundError: a file of the bundle is missing.
        ValueError: a file of the bundle is damaged; `repo_id` can't be a repository's name.
        PushError: no token or one that may not write, no network, a Hub that fails, a public repository where a
            private one was asked for.

    Example:

    >>> from ballad_hf import push_bundle
    >>> push_bundle("outputs/digits", "someone/digits", private=True)  # doctest: +SKIP
    RepoUrl('https://huggingface.co/someone/digits', ...)
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_bundle(folder)
    api = HfApi(token=token)
    with _explained(folder, repo_id, private, with_code, revision):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        name = repository.repo_id
        if private and not api.repo_info(name).private:
            raise PushError(
                f"{name} is public, and a private repository was asked for. Make it private in its settings, or "
                "choose another name."
            )
        there = set(api.list_repo_files(name, revision=revision))
        card = folder / LAYOUT.card
        operations = _operations(folder, there, with_code)
        api.create_commit(name, operations, commit_message=commit_message, revision=revision)
        if card.is_file():
            add = CommitOperationAdd(LAYOUT.card, card)
            api.create_commit(name, [add], commit_message="The model card", revision=revision)
        else:
            logger.warning(f"{folder} has no {LAYOUT.card}, so the repository {name} has no model card.")
    return repository


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` for what can't be a repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} can't be a repository's name: give owner/name or name, of letters, digits, '-', '_' and '.'."
        ) from error


def check_push(repo_id: str, token: str | None = None) -> str:
    """Ask what a push will need before hours of training: a name that can be one, a network, a token that is known.

    Returns:
        The account's name.

    Raises:
        ValueError: `repo_id` can't be a repository's name.
        PushError: no token or an unknown one, no network.
    """
    check_repo_id(repo_id)
    try:
        return HfApi(token=token).whoami()["name"]
    except _FAILURES as error:
        raise PushError(f"A push to {repo_id} would fail: {_reason(error)}") from error


class CheckpointPusher:
    """Uploads training checkpoints in the background, each in the place of the one before, as `last-checkpoint`.

    Training never waits for the Hub: while one checkpoint is on its way only the newest of those that follow is kept
    waiting. A failure is a warning. Use it on the main process alone.

    Args:
        repo_id: `owner/name` or `name`; made where it does not exist.
        private: as in `push_bundle`.
        token: as in `push_bundle`.

    Raises:
        ValueError: `repo_id` can't be a repository's name.

    Example:

    >>> from ballad_hf.hub.push import CheckpointPusher
    >>> with CheckpointPusher("someone/digits") as pusher:  # doctest: +SKIP
    ...     pusher.submit("outputs/digits/checkpoints/step-0000000100")
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, token: str | None = None):
        check_repo_id(repo_id)
        self.repo_id = repo_id
        self.private = private
        self.token = token
        self._change = threading.Condition()
        self._waiting: Path | None = None
        self._closed = False
        # A daemon: a Hub that never answers must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="checkpoint-push", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: str | Path) -> None:
        """Upload this checkpoint's folder as soon as may be. It may be removed right after this call."""
        kept = _hold(Path(checkpoint))
        with self._change:
            overtaken, self._waiting = self._waiting, kept
            self._change.notify()
        if overtaken is not None:
            shutil.rmtree(overtaken, ignore_errors=True)

    def close(self, timeout: float | None = 60) -> None:
        """Let what was submitted go up, but wait no longer than `timeout` seconds."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning(f"A checkpoint on its way to {self.repo_id} is given up; it stays on the disk.")

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._closed)
                folder, self._waiting = self._waiting, None
            if folder is None:
                return
            try:
                self._upload(folder)
            # The Hub's client fails in many ways, and none of them may end the training.
            except Exception as error:
                logger.warning(f"A checkpoint was not pushed to {self.repo_id}: {_reason(error)} Training goes on.")
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, folder: Path) -> None:
        api = HfApi(token=self.token)
        repository = api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        if self.private and not api.repo_info(repository.repo_id).private:
            raise PushError(f"{repository.repo_id} is public, and a private repository was asked for.")
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            path_in_repo=CHECKPOINT_IN_REPO,
            delete_patterns="*",
            commit_message="A checkpoint of the training",
        )


def _hold(folder: Path) -> Path:
    """The same files under another name beside it; hard links where the disk knows them, so that it costs nothing."""
    kept = Path(tempfile.mkdtemp(prefix=".push-", dir=folder.parent))

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return target

    shutil.copytree(folder, kept, copy_function=link, dirs_exist_ok=True)
    return kept


def _operations(folder: Path, there: set[str], with_code: bool) -> list[CommitOperationAdd | CommitOperationDelete]:
    files: dict[str, Path] = {str(file.relative_to(folder).as_posix()): file for file in LAYOUT.files(folder)}
    files.pop(LAYOUT.card, None)
    config = config_without_private_paths(json.loads(files.pop(LAYOUT.config).read_text(encoding="utf-8")))
    config.pop("auto_map", None)
    code = code_files()
    if with_code:
        config = config_with_code(config)
        files.update({file.name: file for file in code})
    public = without_private_paths(folder)
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    stale = {name for name in there if any(Path(name).match(pattern) for pattern in LAYOUT.weight_patterns)}
    stale |= there & {file.name for file in code}
    stale = {name for name in stale if "/" not in name} - set(files)
    return [
        *(CommitOperationAdd(name, public.get(name, file)) for name, file in sorted(files.items())),
        CommitOperationAdd(LAYOUT.config, content),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]


@contextmanager
def _explained(
    folder: Path, repo_id: str, private: bool | None, with_code: bool, revision: str | None
) -> Iterator[None]:
    words = ["python", "-m", "ballad_hf.hub.push", str(folder), repo_id]
    words += ["--private"] * bool(private) + ["--with_code"] * with_code
    words += [] if revision is None else ["--revision", revision]
    later = f"Everything is in {folder}; to push it later:\n    {shlex.join(words)}"
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"The push to {repo_id} was stopped. {later}")
        raise
    except PushError as error:
        raise PushError(f"{error} {later}") from error
    except _FAILURES as error:
        raise PushError(f"The push to {repo_id} failed: {_reason(error)} {later}") from error


def _reason(error: Exception) -> str:
    """What went wrong in words that name the remedy, and what the Hub said."""
    said = str(error).strip().splitlines()
    detail = f" ({said[-1].strip()})" if said else ""
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub's client is told to be offline: unset HF_HUB_OFFLINE."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: run `hf auth login`, or set HF_TOKEN."
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub was not reached{detail}: look at the network, and at HF_ENDPOINT if you set it."
    status = error.response.status_code
    if status == 401:
        return "the Hub does not know the token, or there is none: run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"the token may not write there{detail}: make one with the right to write, or choose another owner."
    if status == 404:
        return f"there is no such repository or branch{detail}: look at the name, or make the branch first."
    if status == 409:
        return f"somebody else is writing to it{detail}: try again."
    if status == 429 or status >= 500:
        return f"the Hub is in trouble, status {status}{detail}: try again later."
    return f"the Hub refused, status {status}{detail}."


def main(command_line: Sequence[str] | None = None) -> None:
    """Push from the command line."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m ballad_hf.hub.push", description="Push a bundle to the Hub.")
    parser.add_argument("folder", help="that save_bundle or the training example wrote")
    parser.add_argument("repo_id", help="owner/name, or name for one of your own")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--with_code", action="store_true", help="put the model's code there too")
    parser.add_argument("--revision", help="a branch that exists")
    given = vars(parser.parse_args(command_line))
    try:
        repository = push_bundle(given.pop("folder"), given.pop("repo_id"), **given)
    except (OSError, ValueError, PushError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"Pushed to {repository}")


if __name__ == "__main__":
    main()
