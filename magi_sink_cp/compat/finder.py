"""What ``import magi_attn_extensions`` finds after compat.install()."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = "magi_attn_extensions"
# The upstream module → the module of this package that provides its functions.
_MODULES = {
    f"{NAME}.fa2_interface_with_sink": "magi_sink_cp.drop_in.fa2",
    f"{NAME}.fa3_interface_with_sink": "magi_sink_cp.drop_in.fa3",
    f"{NAME}.fa4_interface_with_sink": "magi_sink_cp.drop_in.fa4",
}


class ExtensionFinder(MetaPathFinder):
    """Finds the package and its modules; everything else is left to other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == NAME:
            return ModuleSpec(fullname, _ExtensionLoader(), is_package=True)
        return ModuleSpec(fullname, _ExtensionLoader()) if fullname in _MODULES else None


class _ExtensionLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # an ordinary module

    def exec_module(self, module: ModuleType) -> None:
        source_name = _MODULES.get(module.__name__, "magi_sink_cp")
        source = importlib.import_module(source_name)
        names = [name for name in dir(source) if name.endswith("_func_with_sink")]
        module.__doc__ = f"The functions of {source_name} under the name of MagiAttention's module."
        module.__dict__.update({name: getattr(source, name) for name in names})
        module.__dict__["__all__"] = names
        if module.__name__ == NAME:  # as upstream, whose package imports its modules
            for name in _MODULES:
                importlib.import_module(name)
        module.__dict__["__magi_sink_cp__"] = True


def real_location() -> str | None:
    """Where the real package is, or None. An empty folder of that name is not it."""
    for finder in sys.meta_path:
        if isinstance(finder, ExtensionFinder):
            continue
        spec = finder.find_spec(NAME, None)
        if spec is not None:
            return spec.origin
    return None
