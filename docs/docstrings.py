"""Griffe extension: doctests in docstrings become code blocks, and names in brackets become links."""

import importlib.util
import re
from pathlib import Path

import griffe


_PROMPTS = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).*)*", flags=re.MULTILINE)
_REFERENCE = re.compile(r"\[`(?:ballad_hf\.)?(?P<name>\w+)(?P<rest>[^`\n]*)`\](?![\[(])")
_DIRECTIVE = re.compile(r" *# doctest:.*$", flags=re.MULTILINE)


def fence_doctests(docstring: str) -> str:
    """Put every block of prompts and their output, which a blank line ends, into a fence."""

    def fenced(block: re.Match[str]) -> str:
        indent = block["indent"]
        return f"{indent}```pycon\n{_DIRECTIVE.sub('', block[0])}\n{indent}```"

    return _PROMPTS.sub(fenced, docstring)


def link_public_names(docstring: str, addresses: dict[str, str]) -> str:
    """Link [`Name`] to its entry in the reference; a name without one loses its brackets."""

    def linked(reference: re.Match[str]) -> str:
        code = f"`{reference['name']}{reference['rest']}`"
        address = addresses.get(reference["name"])
        return code if address is None else f"[{code}][{address}]"

    return _REFERENCE.sub(linked, docstring)


class Docstrings(griffe.Extension):
    def __init__(self):
        # Extensions are loaded by their path, and so is what they share with the hooks.
        spec = importlib.util.spec_from_file_location("hooks", Path(__file__).with_name("hooks.py"))
        hooks = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(hooks)
        self.addresses = hooks.addresses()

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = link_public_names(fence_doctests(obj.docstring.value), self.addresses)
