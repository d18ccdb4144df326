"""Griffe extension: show the doctests of docstrings as code, without the directives of doctest."""

import re

import griffe


_PROMPTS = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).*)*", flags=re.MULTILINE)
_DIRECTIVE = re.compile(r" *# doctest:.*$", flags=re.MULTILINE)


def fence_doctests(docstring: str) -> str:
    """Put every block of prompts and their output, which a blank line ends, into a fence."""

    def fenced(block: re.Match[str]) -> str:
        indent = block["indent"]
        return f"{indent}```pycon\n{_DIRECTIVE.sub('', block[0])}\n{indent}```"

    return _PROMPTS.sub(fenced, docstring)


class FenceDoctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence_doctests(obj.docstring.value)
