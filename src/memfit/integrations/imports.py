"""Call a function right after a module has been imported, whoever imports it and whenever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AfterImport = Callable[[ModuleType], None]


class ImportWatcher(MetaPathFinder):
    """Watches the import of named modules; nothing is imported on its account.

    The module's spec and loader are the original ones again before its code runs, so that nobody sees a difference.
    """

    def __init__(self, callbacks: Mapping[str, AfterImport]) -> None:
        self._callbacks = dict(callbacks)

    def install(self) -> None:
        """Begin to watch. Modules that are there already are called at once."""
        sys.meta_path.insert(0, self)
        for name in list(self._callbacks):
            if name in sys.modules:
                self.arrived(name, sys.modules[name])

    def remove(self) -> None:
        """Stop. A second call does nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._callbacks.clear()

    def arrived(self, name: str, module: ModuleType) -> None:
        """The code of a watched module has run."""
        callback = self._callbacks.pop(name, None)
        if callback is not None:
            callback(module)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells us when it is done."""
        if name not in self._callbacks:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _TellingLoader(self, spec, spec.loader)
                return spec
        return None


class _TellingLoader(Loader):
    def __init__(self, watcher: ImportWatcher, spec: ModuleSpec, loader: Loader) -> None:
        self._watcher = watcher
        self._spec = spec
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._watcher.arrived(self._spec.name, module)
