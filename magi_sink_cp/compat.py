"""Run code that was written for ``magi_attn_extensions`` on this package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

_NAME = "magi_attn_extensions"


def install() -> None:
    """Make ``import magi_attn_extensions`` resolve to this package's fa2_*, fa3_* and fa4_* functions, for this process.

    Calling it again changes nothing.

    Raises:
        RuntimeError: the real magi_attn_extensions is installed or imported; it is left alone.
    """
    import magi_sink_cp

    known = sys.modules.get(_NAME)
    if known is not None and getattr(known, "__magi_sink_cp__", False):
        return
    spec = importlib.util.find_spec(_NAME) if known is None else None
    if known is not None or spec is not None:
        where = getattr(known, "__file__", None) if spec is None else spec.origin
        raise RuntimeError(
            f"the real {_NAME} is installed ({where}), and compat.install() does not replace it. Uninstall it, or import the "
            "functions from magi_sink_cp"
        )
    names = [name for name in magi_sink_cp.__all__ if name.endswith("_func_with_sink")]
    module = types.ModuleType(_NAME, "magi_sink_cp's functions under the name of MagiAttention's extension.")
    module.__dict__.update({name: getattr(magi_sink_cp, name) for name in names}, __all__=names, __magi_sink_cp__=True)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)
    sys.modules[_NAME] = module
