"""Tells the Auto classes of transformers about Ballad, without importing transformers before the user does.

`AutoConfig.register` needs transformers' auto module, which imports torch. A program that only asks for the version
or `--help` should not pay for it, and a program that says `import ballad_hf` and then `pipeline(..., model=folder)`
should simply work. Both hold when registration waits for that module to be imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys


# A module of transformers, and the room that registers with it.
_REGISTERS_WITH = {
    "transformers.models.auto.modeling_auto": "ballad_hf.models",
    "transformers.pipelines": "ballad_hf.inference",
}


def register_when_transformers_loads() -> None:
    """Register at once with what is loaded of transformers already, with the rest right after it is."""
    for module, room in _REGISTERS_WITH.items():
        if module in sys.modules:
            importlib.import_module(room)
        elif not any(isinstance(finder, _ModuleFinder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _ModuleFinder(module, room))


class _ModuleFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it hands the real loader of one module on, with the registration behind it."""

    def __init__(self, module: str, room: str):
        self.module = module
        self.room = room

    def find_spec(self, fullname, path, target=None):
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.room)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader, room: str):
        self.loader = loader
        self.room = room

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        # Readers of sources and resources ask the loader, and only the real one can answer.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.room)
