"""Tells the Auto classes of transformers about Ballad, without importing transformers before the user does.

`AutoConfig.register` needs transformers' auto module, which imports torch. A program that only asks for the version
or `--help` should not pay for it, and a program that says `import ballad_hf` and then `pipeline(..., model=folder)`
should simply work. Both hold when registration waits for that module to be imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys


_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register_when_transformers_loads() -> None:
    """Register at once where transformers' Auto classes are loaded already, else right after they are."""
    if _AUTO_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())


def _register() -> None:
    importlib.import_module("ballad_hf.models")


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it hands the real loader of one module on, with the registration behind it."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register()
