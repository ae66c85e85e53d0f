"""Imports that wait for their first use: for libraries that import others at their top which are hardly ever used.

While a block runs, stand-ins take the places of modules. They hold the named functions and classes as objects that
import the real one when something is done with them; whatever else they are asked for imports the real module at once.
So an unforeseen use costs the time that it always cost, and gives what it always gave.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Union

Contents = Sequence[str] | Mapping[str, Any]
"""Of a stand-in: names that are deferred, or names with what takes their place."""


class Deferred:
    """A function or class of a module that is imported when this is called, looked into or derived from."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(real_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self._real())

    def __subclasscheck__(self, value: type) -> bool:
        return issubclass(value, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:  # of annotations
        return Union[self, other]  # noqa: UP007 - that would ask this method

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


class StandIn(ModuleType):
    """In the place of a module."""

    def __init__(self, module: str, contents: Contents) -> None:
        super().__init__(module)
        self.__spec__ = ModuleSpec(module, None)
        self.__path__: list[str] = []
        if not isinstance(contents, Mapping):
            contents = {name: Deferred(module, name) for name in contents}
        self.__dict__.update(contents)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(name)  # `inspect` asks every module for its file
        return getattr(real_module(self.__name__), name)


def real_module(name: str) -> ModuleType:
    """The module itself, imported where it is not; a stand-in leaves its place to it."""
    if isinstance(sys.modules.get(name), StandIn):
        del sys.modules[name]
    return importlib.import_module(name)


class _RealParents(MetaPathFinder):
    """Below a stand-in nothing can be found, so the real package comes where some module of it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if not isinstance(sys.modules.get(parent), StandIn):
            return None
        return PathFinder.find_spec(name, real_module(parent).__path__, target)


class AfterImport(MetaPathFinder):
    """In `sys.meta_path`: `then` is called with a module as soon as it is imported, before anybody else sees it."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self._module, self._then = module, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._module or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_first(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        loader.exec_module = execute_first
        return spec


@contextmanager
def after_import(module: str, then: Callable[[ModuleType], None]) -> Iterator[None]:
    """`AfterImport` for a block."""
    finder = AfterImport(module, then)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def deferred(stand_ins: Mapping[str, Contents]) -> Iterator[None]:
    """Within the block, a module of `stand_ins` is not imported, unless more is asked of it than what stands there.

    Modules that are imported already, and those of packages that are not installed, are left alone. Other threads that
    import at the same time may get stand-ins too; they hold the same.
    """
    finder = _RealParents()
    sys.meta_path.insert(0, finder)
    for module, contents in stand_ins.items():
        if module not in sys.modules and importlib.util.find_spec(module.partition(".")[0]) is not None:
            sys.modules[module] = StandIn(module, contents)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in stand_ins:
            if isinstance(sys.modules.get(module), StandIn):
                del sys.modules[module]
