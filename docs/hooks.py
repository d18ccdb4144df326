"""Hooks of the documentation site.

The address of the repository is that of the package's metadata. A line `::: public names of ballad_hf.data` on a page
of the reference becomes one entry for each public name of that package, from `ballad_hf.__all__`.
"""

import configparser
import logging
import re
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
log = logging.getLogger("mkdocs.plugins.ballad_hf")
_PUBLIC = re.compile(r"^::: public names of ballad_hf\.(?P<package>\w+)$", flags=re.MULTILINE)
_OUTSIDE = re.compile(r"\]\(\.\./(?P<path>(?!\.\.)[\w./-]+)")


def on_config(config):
    """Link the repository that setup.cfg names."""
    url = project_url()
    if url is not None:
        config.repo_url = url
        config.repo_name = url.removeprefix("https://github.com/")
        config.edit_uri = "edit/main/docs/"
    return config


def on_page_markdown(markdown, page, config, files):
    """List the public names of a package, and send links to files outside of the site to the repository."""
    markdown = _PUBLIC.sub(lambda line: "\n\n".join(f"::: {name}" for name in public_names(line["package"])), markdown)
    if page.file.src_uri.count("/") == 0 and config.repo_url:
        markdown = _OUTSIDE.sub(lambda link: f"]({_address(config.repo_url, link['path'])}", markdown)
    return markdown


def project_url() -> str | None:
    """The first project URL of setup.cfg."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    entries = metadata["metadata"].get("project_urls", "").strip().splitlines()
    return entries[0].partition("=")[2].strip() if entries else None


def addresses() -> dict[str, str]:
    """Public name -> its full name, such as `ballad_hf.data.samplers.ClassAwareSampler`."""
    sys.path.insert(0, str(ROOT))
    try:
        import ballad_hf  # light: it imports neither torch nor transformers
    finally:
        sys.path.remove(str(ROOT))
    return {name: f"ballad_hf.{module}.{name}" for name, module in ballad_hf._MODULE_OF.items()}


def public_names(package: str) -> list[str]:
    """Full names of what `ballad_hf.__all__` takes from one of its packages."""
    names = [address for address in addresses().values() if address.split(".")[1] == package]
    if not names:
        log.warning(f"The reference has a page for ballad_hf.{package}, which has no public names.")
    return names


def _address(repository: str, path: str) -> str:
    path = path.rstrip("/")
    if not (ROOT / path).exists():
        log.warning(f"A page links ../{path}, which does not exist.")
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
