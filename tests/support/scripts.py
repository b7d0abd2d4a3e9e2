"""Scripts run in the test's own process."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a script's main() with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    try:
        return script.main()
    except SystemExit as end:
        return end.code
