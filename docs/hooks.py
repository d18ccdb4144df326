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
# A link from a page of docs/ to a file beside docs/; on the pages of the reference, ../ is docs/ itself.
_OUTSIDE = re.compile(r"\[(?P<text>[^\]\n]+)\]\(\.\./(?P<path>(?!\.\.)[\w./-]+)(?P<anchor>#[\w-]+)?\)")


def on_config(config):
    """Link the repository that setup.cfg names."""
    url = project_url()
    if url is not None:
        config.repo_url = url
        config.repo_name = url.removeprefix("https://github.com/")
        config.edit_uri = "edit/main/docs/"
    return config


def on_page_markdown(markdown, page, config, files):
    """List the public names of a package, and send links to files outside of the site to the repository.

    Where setup.cfg names no repository, such a link becomes its text.
    """
    markdown = _PUBLIC.sub(lambda line: "\n\n".join(f"::: {name}" for name in public_names(line["package"])), markdown)
    if "/" not in page.file.src_uri:
        markdown = _OUTSIDE.sub(lambda link: outside_link(link, config.repo_url), markdown)
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


def outside_link(link: re.Match[str], repository: str | None) -> str:
    """The link to a file of the repository, which has to exist."""
    path = ROOT / link["path"]
    if not path.exists():
        log.warning(f"A page links ../{link['path']}, which does not exist.")
    if repository is None:
        return link["text"]
    kind = "tree" if path.is_dir() else "blob"
    return f"[{link['text']}]({repository}/{kind}/main/{link['path'].rstrip('/')}{link['anchor'] or ''})"
