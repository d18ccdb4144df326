"""Make a Gradio Space of a model: a page to try it in the browser.

The Space needs no `ballad_hf`: it loads the model with the code that is pushed with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError

from ..files import read_json
from .model_directory import LAYOUT, check_model_directory
from .push import (
    PushError,
    check_repo_id,
    code_files,
    config_with_code,
    config_without_local_paths,
    explain_failures,
    requirements,
    time_limit,
)


# Versions that the Space runs on; the page is tested with them.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.12"
MODEL_FOLDER = "model"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def push_space(
    model: str | Path,
    space_id: str | None = None,
    *,
    title: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload demo of a BALLAD model",
) -> RepoUrl:
    """Create or update a Gradio Space that shows a model. Call it on the main process only.

    A model directory is uploaded into the Space, without its card and results. A model on the Hub stays where it is,
    and the Space is pinned to its commit: push the Space again after a new version of the model. If that model is
    private, the Space needs a token with read access as its secret `HF_TOKEN`.

    Args:
        model: a model directory, or the name of a model on the Hub that was pushed with its code.
        space_id: `owner/name`, or `name` in your own namespace; default: the name of the model.
        title: of the page; default: the name of the model.
        private: `True` for a private Space; nothing is uploaded if a public one of that name exists. `None` for the
            account's default.
        token: a Hub token with write access; default: that of `hf auth login` or `HF_TOKEN`.
        revision: branch, tag or commit of a model on the Hub; default: its main branch.
        commit_message: of the commit.

    Returns:
        The URL of the Space, a string.

    Raises:
        FileNotFoundError: a file of the model directory is missing.
        ValueError: `space_id` or `model` is not a valid name; a damaged file; a model on the Hub that is no BALLAD
            model or was pushed without its code.
        PushError: no token or no write access, no network, a Hub that fails or does not answer, a public Space where
            a private one was requested.

    Example:

    >>> from ballad_hf.hub.space import push_space
    >>> push_space("outputs/digits", "someone/digits-demo", private=True)  # doctest: +SKIP
    RepoUrl('https://huggingface.co/spaces/someone/digits-demo', ...)
    """
    is_local = Path(model).is_dir()
    space_id = space_id or (Path(model).resolve().name if is_local else str(model))
    check_repo_id(space_id)
    if is_local:
        check_model_directory(model)
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {model} is a folder: leave revision out.")
    else:
        check_repo_id(str(model))
    api = HfApi(token=token)
    with explain_failures(space_id, f"The model {model} is unchanged; push the Space again later."), time_limit():
        files = _files_of_folder(Path(model), title) if is_local else _files_of_repo(api, str(model), revision, title)
        space = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if private and not api.repo_info(space.repo_id, repo_type="space").private:
            raise PushError(f"The Space {space.repo_id} is public, but a private one was requested.")
        existing = api.list_repo_files(space.repo_id, repo_type="space")
        stale = [name for name in existing if name.startswith(f"{MODEL_FOLDER}/") and name not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
            *(CommitOperationDelete(name) for name in stale),
        ]
        api.create_commit(space.repo_id, operations, commit_message=commit_message, repo_type="space")
    return space


def space_files(
    model_id: str, *, model: str, revision: str | None = None, title: str | None = None, license: str | None = None
) -> dict[str, bytes]:
    """The page, its README and its requirements, without a model.

    Args:
        model_id: how the page calls the model, such as `owner/name`.
        model: what the page loads: a name on the Hub, or a folder of the Space.
        revision: commit of a model on the Hub.
        title: of the page; default: the name of the model.
        license: identifier of the model's license.

    Returns:
        Content by file name.

    Example:

    >>> from ballad_hf.hub.space import space_files
    >>> print(space_files("someone/digits", model="someone/digits")["README.md"].decode()[:29])
    ---
    title: digits
    sdk: gradio
    """
    on_the_hub = model == model_id
    title = title or model_id.split("/")[-1]
    header: dict[str, Any] = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "pinned": False,
        "license": license,
        "models": [model_id] if on_the_hub else None,
        "tags": ["ballad", "long-tailed-recognition", "image-classification"],
    }
    described = yaml.safe_dump(
        {name: value for name, value in header.items() if value is not None}, sort_keys=False, allow_unicode=True
    )
    names = {"model_id": model_id, "title": title, "on_the_hub": on_the_hub}
    readme = _render("space_readme.md.jinja", header=described.strip(), **names)
    app = _render("space_app.py.jinja", model=model, revision=revision, **names)
    return {"README.md": readme, "app.py": app, "requirements.txt": requirements("torch", "transformers")}


def _files_of_folder(folder: Path, title: str | None) -> Mapping[str, bytes | Path]:
    files = space_files(folder.resolve().name, model=MODEL_FOLDER, title=title, license=_license(folder / LAYOUT.card))
    model: dict[str, bytes | Path] = {
        file.name: file for file in (*LAYOUT.files(folder, LAYOUT.model_patterns), *code_files())
    }
    config = config_with_code(config_without_local_paths(read_json(folder / LAYOUT.config)))
    model[LAYOUT.config] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return {**files, **{f"{MODEL_FOLDER}/{name}": content for name, content in model.items()}}


def _files_of_repo(api: HfApi, repo_id: str, revision: str | None, title: str | None) -> Mapping[str, bytes | Path]:
    info = api.model_info(repo_id, revision=revision)
    try:
        config = read_json(hf_hub_download(repo_id, LAYOUT.config, revision=info.sha, token=api.token))
    except EntryNotFoundError:
        config = {}
    if config.get("model_type") != "ballad":
        raise ValueError(f"{repo_id} holds a {config.get('model_type')} model: name a BALLAD model.")
    if "auto_map" not in config:
        raise ValueError(
            f"{repo_id} was pushed without its code, which the Space needs: push it with with_code=True, or pass the "
            "model directory."
        )
    license = info.card_data.get("license") if info.card_data else None
    return space_files(info.id, model=info.id, revision=info.sha, title=title, license=license)


def _license(card: Path) -> str | None:
    metadata = metadata_load(card) if card.is_file() else None
    return metadata.get("license") if metadata else None


def _render(template: str, **context: Any) -> bytes:
    return _TEMPLATES.get_template(template).render(context).encode()
