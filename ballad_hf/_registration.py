"""Registers the models with the Auto classes, without importing transformers before the user does.

`AutoConfig.register` needs transformers' auto module, which takes seconds to import. `ballad --help` should not wait
for it, and `import ballad_hf` followed by `pipeline(..., model=folder)` should work. So registration waits until that
module is imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any


# A module of transformers -> the package that registers with it.
_REGISTERS_WITH = {
    "transformers.models.auto.modeling_auto": "ballad_hf.models",
    "transformers.pipelines": "ballad_hf.inference",
}


def register_when_transformers_loads() -> None:
    """Register with what is imported already, and with the rest right after its import."""
    for module, package in _REGISTERS_WITH.items():
        if module in sys.modules:
            importlib.import_module(package)
        elif not any(isinstance(finder, _ModuleFinder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _ModuleFinder(module, package))


class _ModuleFinder(importlib.abc.MetaPathFinder):
    """Wraps the loader of one module, so that registration follows its import."""

    def __init__(self, module: str, package: str):
        self.module = module
        self.package = package

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.package)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any, package: str):
        self.loader = loader
        self.package = package

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Readers of source code and resources ask the loader of the module for them.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.package)
