"""Push model directories to the Hub, and training checkpoints in the background.

The local folder is only read: whatever happens on the network, the model stays.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import shlex
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl, get_session
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..files import StagingFolder, read_json, read_text, read_yaml
from ..models import modeling_ballad
from .model_card import is_local_path, strip_local_paths
from .model_directory import HELD_CHECKPOINTS, LAYOUT, check_model_directory


logger = logging.get_logger(__name__)

CHECKPOINT_IN_REPO = "last-checkpoint"
# Seconds without a byte from or to the Hub; its client would wait for ever.
HUB_TIMEOUT = 120.0
HANDLER = Path(__file__).with_name("endpoint_handler.py")
_MODEL = "modeling_ballad.BalladForImageClassification"
AUTO_MAP = {
    "AutoConfig": "configuration_ballad.BalladConfig",
    "AutoModel": "modeling_ballad.BalladModel",
    "AutoModelForImageClassification": _MODEL,
    "AutoModelForZeroShotImageClassification": _MODEL,
}
# HTTPError is that of the HTTP library behind the installed client (httpx or httpx2). The client raises a bare
# RuntimeError for a large file that it could not upload.
_FAILURES = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError)


class PushError(RuntimeError):
    """A push failed. The message says why, that the local folder is complete, and how to push it later."""


def push_model_directory(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    with_code: bool = False,
    with_handler: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload BALLAD model",
) -> RepoUrl:
    """Upload a model directory, and no other files of its folder, to the Hub. Call it on the main process only.

    The repository is created if missing. Everything but the model card goes into one commit, and then the card, so
    that nobody reads about a model that is not there yet. Weights of an earlier push under other names are removed.
    Local paths in the config, the arguments and the report are cut to their last component; links are refused.

    Args:
        folder: saved by `BalladTrainer.save_model`; it is not changed.
        repo_id: `owner/name`, or `name` in your own namespace.
        private: `True` for a private repository; nothing is uploaded if a public one of that name exists. `None` for
            the account's default.
        token: a Hub token with write access; default: that of `hf auth login` or `HF_TOKEN`.
        with_code: upload the model's code too, so that it loads with `trust_remote_code=True` without this package.
        with_handler: upload `handler.py` and `requirements.txt` for Inference Endpoints, and the code with them. They
            stay in the repository until you delete them.
        revision: an existing branch; default: the main one.
        commit_message: of the commit.

    Returns:
        The URL of the repository, a string.

    Raises:
        FileNotFoundError: a file of the model directory is missing.
        ValueError: a file is damaged or a symbolic link; `repo_id` is not a valid repository name.
        PushError: no token or no write access, no network, a Hub that fails or does not answer, a public repository
            where a private one was requested.

    Example:

    >>> from ballad_hf import push_model_directory
    >>> push_model_directory("outputs/digits", "someone/digits", private=True)  # doctest: +SKIP
    RepoUrl('https://huggingface.co/someone/digits', ...)
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_model_directory(folder)
    # Everything local is read before the network is asked, so that a damaged file is not taken for its fault.
    card = folder / LAYOUT.card if (folder / LAYOUT.card).is_file() else None
    content = _content(folder, with_code or with_handler)
    later = _how_to_push_later(
        folder, repo_id, revision, private=private, with_code=with_code, with_handler=with_handler
    )
    api = HfApi(token=token)
    with explain_failures(repo_id, later), time_limit():
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        name = repository.repo_id
        if private and not api.repo_info(name).private:
            raise PushError(
                f"{name} is public, but a private repository was requested: make it private in its settings, or "
                "choose another name."
            )
        existing = set(api.list_repo_files(name, revision=revision))
        operations = _operations(content, existing)
        if with_handler:
            operations.append(CommitOperationAdd("handler.py", HANDLER))
            operations.append(CommitOperationAdd("requirements.txt", requirements("transformers")))
        api.create_commit(name, operations, commit_message=commit_message, revision=revision)
        if card is not None:
            add = CommitOperationAdd(LAYOUT.card, card)
            api.create_commit(name, [add], commit_message="Upload model card", revision=revision)
        else:
            logger.warning(f"{folder} has no {LAYOUT.card}, so the repository {name} has no model card.")
    return repository


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` for an invalid repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is not a valid repository name: use owner/name or name, with letters, digits, '-', '_', '.'."
        ) from error


def check_push(repo_id: str, token: str | None = None) -> str:
    """Check before hours of training that a push can work: a valid name, a network, a known token.

    Returns:
        The name of the account.

    Raises:
        ValueError: `repo_id` is not a valid repository name.
        PushError: no token or an unknown one, no network, or no answer.
    """
    check_repo_id(repo_id)
    try:
        with time_limit():
            return HfApi(token=token).whoami()["name"]
    except _FAILURES as error:
        raise PushError(f"A push to {repo_id} would fail: {_reason(error)}") from error


class CheckpointPusher:
    """Uploads training checkpoints in the background, each replacing the one before, to `last-checkpoint/`.

    Training never waits for the Hub: while one checkpoint is being uploaded, only the newest of those that follow is
    kept. A failure is a warning. Use it on the main process only.

    Args:
        repo_id: `owner/name` or `name`; created if missing.
        private: see `push_model_directory`.
        token: see `push_model_directory`.

    Raises:
        ValueError: `repo_id` is not a valid repository name.

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
        self._waiting: StagingFolder | None = None
        self._closed = False
        # A daemon thread: a Hub that never answers must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="checkpoint-push", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: str | Path) -> None:
        """Upload this checkpoint's folder as soon as possible. It may be deleted right after this call."""
        held = _hold(Path(checkpoint))
        with self._change:
            overtaken, self._waiting = self._waiting, held
            self._change.notify()
        if overtaken is not None:
            overtaken.remove()

    def close(self, timeout: float | None = 60) -> None:
        """Wait up to `timeout` seconds for the uploads to finish."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning(
                f"The upload of a checkpoint to {self.repo_id} did not finish in {timeout} s; it stays on the disk."
            )

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._closed)
                held, self._waiting = self._waiting, None
            if held is None:
                return
            try:
                self._upload(held.path)
            # The Hub's client fails in many ways, and none of them may end the training.
            except Exception as error:
                logger.warning(f"A checkpoint was not pushed to {self.repo_id}: {_reason(error)} Training continues.")
            finally:
                held.remove()

    def _upload(self, folder: Path) -> None:
        api = HfApi(token=self.token)
        with time_limit():
            repository = api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.private and not api.repo_info(repository.repo_id).private:
                raise PushError(f"{repository.repo_id} is public, but a private repository was requested.")
            api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=folder,
                path_in_repo=CHECKPOINT_IN_REPO,
                delete_patterns="*",
                commit_message="Upload training checkpoint",
            )


def code_files() -> list[Path]:
    """The model's source file and every file that it imports, directly or not.

    transformers imports such files from a repository with `trust_remote_code=True`. It needs them flat in the root of
    the repository, importing each other only as `from .x import y`; the package `models` is written that way.
    """
    source = Path(str(modeling_ballad.__file__))
    return sorted({source, *(Path(file) for file in get_relative_import_files(str(source)))})


def requirements(*packages: str) -> bytes:
    """Content of a `requirements.txt` with the installed versions, which the model is known to run with."""
    # The local part of a version, such as +cpu, is not in the package index.
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in packages).encode()


def config_with_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a `config.json` that points the Auto classes to the repository's own code."""
    return {**config, "auto_map": AUTO_MAP}


def without_local_paths(folder: Path) -> dict[str, bytes]:
    """The files of a model directory that show a run's arguments or image files, with local paths cut.

    Args:
        folder: the model directory; it is only read.

    Returns:
        Content by file name, for files that show a local path.

    Raises:
        ValueError: the arguments can't be read.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from ballad_hf.hub.push import without_local_paths
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "arguments.yaml").write_text("dataset: ../home_of_alice/birds\\nseed: 3\\n")
    >>> without_local_paths(folder)
    {'arguments.yaml': b'dataset: birds\\nseed: 3\\n'}
    """
    names = (LAYOUT.recipe, LAYOUT.arguments, LAYOUT.mistakes, LAYOUT.report)
    texts = {name: read_text(folder / name) for name in names if (folder / name).is_file()}
    found: dict[str, str] = {}
    public = {}
    try:
        if LAYOUT.recipe in texts:
            arguments = strip_local_paths(read_yaml(folder / LAYOUT.recipe), found)
            public[LAYOUT.recipe] = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
        if LAYOUT.arguments in texts:
            record = strip_local_paths(read_json(folder / LAYOUT.arguments), found)
            public[LAYOUT.arguments] = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The arguments of the run in {folder} can't be read: {error}") from error
    root = _root_of_images(texts.get(LAYOUT.mistakes, ""))
    if root:
        found[root] = ""
    if not found:
        return {}
    for name in (LAYOUT.mistakes, LAYOUT.report):
        if name in texts:
            public[name] = _replace_all(texts[name], found)
    return {name: text.encode() for name, text in public.items() if text != texts[name]}


def config_without_local_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config in which `_name_or_path`, at any depth, is no local path; class names stay as they are.

    Example:

    >>> from ballad_hf.hub.push import config_without_local_paths
    >>> config_without_local_paths({"clip_config": {"_name_or_path": "/home/me/clip"}, "id2label": {"0": "/m/01"}})
    {'clip_config': {'_name_or_path': 'clip'}, 'id2label': {'0': '/m/01'}}
    """
    public = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = config_without_local_paths(value)
        public[name] = strip_local_paths(value, {}) if name == "_name_or_path" else value
    return public


def _root_of_images(table: str) -> str:
    """The part of the image paths in `mistakes.csv` that says where on this disk they are, or nothing."""
    files = [row["file"] or "" for row in csv.DictReader(io.StringIO(table)) if "file" in row]
    folders = [os.path.dirname(file.removeprefix("'")) for file in files if is_local_path(file.removeprefix("'"))]
    if not folders:
        return ""
    try:
        root = os.path.dirname(os.path.commonpath(folders))
    except ValueError:  # absolute and relative paths, or several drives
        return ""
    return root + os.sep if len(root) > 1 else ""


def _replace_all(text: str, found: Mapping[str, str]) -> str:
    for path in sorted(found, key=len, reverse=True):  # one path may start with another
        if len(path) > 2:  # such as "/", which is everywhere in a page
            text = text.replace(path, found[path]).replace(html.escape(path), html.escape(found[path]))
    return text


def _hold(folder: Path) -> StagingFolder:
    """A copy of a folder beside it, made of hard links where the disk has them. Symbolic links are left out."""
    held = StagingFolder(folder.parent, HELD_CHECKPOINTS)

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return target

    def links(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if os.path.islink(os.path.join(directory, name))}

    shutil.copytree(folder, held.path, copy_function=link, ignore=links, dirs_exist_ok=True)
    return held


def _content(folder: Path, with_code: bool) -> dict[str, Path | bytes]:
    """What to upload, by name in the repository, without the card: files, or their content without local paths."""
    files: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): file for file in LAYOUT.files(folder)}
    files.pop(LAYOUT.card, None)
    config = config_without_local_paths(read_json(folder / LAYOUT.config))
    config.pop("auto_map", None)
    if with_code:
        config = config_with_code(config)
        files.update({file.name: file for file in code_files()})
    files.update(without_local_paths(folder))
    files[LAYOUT.config] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _operations(
    content: Mapping[str, Path | bytes], existing: set[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    stale = {name for name in existing if any(Path(name).match(pattern) for pattern in LAYOUT.weight_patterns)}
    stale |= existing & {file.name for file in code_files()}
    stale = {name for name in stale if "/" not in name} - set(content)
    return [
        *(CommitOperationAdd(name, file) for name, file in sorted(content.items())),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]


@contextmanager
def time_limit() -> Iterator[None]:
    """Let the requests to the Hub time out: its client has no limit of its own."""
    session = get_session()
    before, session.timeout = session.timeout, HUB_TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def explain_failures(repo_id: str, later: str) -> Iterator[None]:
    """Raise a `PushError` for whatever the client of the Hub raises: the reason, and how to push later."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"The push to {repo_id} was interrupted. {later}")
        raise
    except PushError as error:
        raise PushError(f"{error} {later}") from error
    except _FAILURES as error:
        raise PushError(f"The push to {repo_id} failed: {_reason(error)} {later}") from error


def _how_to_push_later(folder: Path, repo_id: str, revision: str | None, **flags: bool | None) -> str:
    words = ["ballad", "push", str(folder), repo_id]
    words += [f"--{flag}" for flag, is_set in flags.items() if is_set]
    words += [] if revision is None else ["--revision", revision]
    return f"The model is complete in {folder}; to push it later:\n    {shlex.join(words)}"


def _reason(error: BaseException) -> str:
    """What went wrong and what to do, with what the Hub answered."""
    cause = _http_error(error)
    lines = str(cause or error).strip().splitlines()
    detail = f" ({lines[-1].strip()})" if lines else ""
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub client is in offline mode: unset HF_HUB_OFFLINE."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} can't be read ({error.strerror}): check the file."
    if cause is None:
        if any("Timeout" in type(link).__name__ for link in _chain(error)):
            return f"the Hub did not answer within {HUB_TIMEOUT:g} s{detail}: check the network, or try again later."
        return f"the Hub was not reached{detail}: check the network, and HF_ENDPOINT if it is set."
    status = cause.response.status_code
    if status == 401:
        return "the Hub does not know the token, or there is none: run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"the token has no write access there{detail}: create one that has, or choose another owner."
    if status == 404:
        return f"there is no such repository or branch{detail}: check the name, or create the branch first."
    if status == 409:
        return f"someone else is writing to it{detail}: try again."
    if status == 429 or status >= 500:
        return f"the Hub is in trouble, status {status}{detail}: try again later."
    return f"the Hub refused the request, status {status}{detail}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, from the outermost inwards."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_error(error: BaseException) -> Any:
    """The answer of the Hub behind an error; the client wraps that of an upload in a RuntimeError."""
    return next((link for link in _chain(error) if getattr(link, "response", None) is not None), None)
