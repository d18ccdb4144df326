import sys

from setuptools import setup


# pip looks at python_requires only after it has resolved the dependencies: here the message comes first and is clear.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"ballad_hf needs Python 3.11 or newer, and this is {sys.version.split()[0]} ({sys.executable}). "
        "Use a virtual environment of a newer one: python3.11 -m venv .venv"
    )

setup()
