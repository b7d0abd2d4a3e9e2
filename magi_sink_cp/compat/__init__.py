"""Run code that was written for ``magi_attn_extensions`` on this package."""

from __future__ import annotations

import sys

from magi_sink_cp.compat.finder import NAME, ExtensionFinder, real_location


def install() -> None:
    """Make ``import magi_attn_extensions`` resolve to this package, for this process.

    It provides the fa2_*, fa3_* and fa4_* functions, and its modules as they exist upstream:
    ``fa2_interface_with_sink``, ``fa3_interface_with_sink``, ``fa4_interface_with_sink``. Calling
    it again changes nothing.

    Raises:
        RuntimeError: the real magi_attn_extensions is installed or imported. It is left alone.
    """
    known = sys.modules.get(NAME)
    if known is not None and getattr(known, "__magi_sink_cp__", False):
        return
    if known is not None and getattr(known.__spec__, "origin", "a file") is None:
        del sys.modules[NAME]  # an empty folder of that name
        known = None
    where = real_location() if known is None else getattr(known, "__file__", None)
    if known is not None or where is not None:
        raise RuntimeError(
            f"the real {NAME} is installed ({where}), and compat.install() does not replace it. "
            "Uninstall it, or import the functions from magi_sink_cp"
        )
    if not any(isinstance(finder, ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ExtensionFinder())
