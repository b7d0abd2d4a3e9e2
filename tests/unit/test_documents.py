"""What README and docs promise: examples run, commands exist, lists are complete."""

from __future__ import annotations

import ast
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, int, str]]:
    """(page, number, code) of every block of a language."""
    found = []
    for page in PAGES:
        code = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
        found += [(page.name, number, text) for number, text in enumerate(code)]
    return found


PYTHON = {f"{page} {number}": code for page, number, code in blocks("python")}


def test_the_readme_has_three_examples():
    examples = [code for name, code in PYTHON.items() if name.startswith("README")]
    assert len(examples) == 3
    assert all(len(example.splitlines()) <= 25 for example in examples)


@pytest.mark.parametrize("name", PYTHON)
def test_examples_run(name, tmp_path):
    """Each in a process of its own; one with init_process_group on two ranks too."""
    for package in ("megatron", "torchtitan"):
        if f"from {package}" in PYTHON[name] and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = tmp_path / "example.py"
    script.write_text(PYTHON[name])
    process = SERVER.Process(target=run_example, args=(script,))
    process.start()
    process.join()
    assert process.exitcode == 0, script.with_suffix(".txt").read_text()
    if "init_process_group" in PYTHON[name]:
        ranks = 1 if torch.cuda.device_count() == 1 else 2
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, str(script)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


# Its processes begin with the package imported, which takes seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["magi_sink_cp"])


def run_example(script: Path) -> None:
    """As a script, with what it prints in a file beside it."""
    with script.with_suffix(".txt").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        os.chdir(ROOT)
        runpy.run_path(str(script), run_name="__main__")


def commands() -> list[str]:
    lines = [line for _, _, code in blocks("bash") for line in code.splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines} - {""})


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command):
    """make targets, scripts with their options, extras."""
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        extra = re.search(r"\[(\w+)\]", words[2])
        extras = re.search(r"EXTRAS := (.*)", (ROOT / "Makefile").read_text()).group(1).split()
        assert extra is None or extra.group(1) in extras
    else:
        assert words[0] in ("python", "torchrun")
        script = next(n for n, word in enumerate(words) if word.endswith(".py"))
        text = (ROOT / words[script]).read_text()
        for option in (word for word in words[script:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{words[script]} has no {option}"


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# What a user cannot meet: these are invariants between our own parts.
INTERNAL = (
    "merge takes",
    "accumulate takes",
    "sink_gradient needs",
    "wait() was called",
    "the record",
)


def raised_messages() -> list[tuple[str, str]]:
    """(file, text) of every error that the package raises, with … for what is filled in."""
    found = []
    for path in (ROOT / "magi_sink_cp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                found.append((path.name, static_text(node.exc.args[0])))
    return found


def static_text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(static_text(value) for value in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_troubleshooting_lists_every_error():
    """Each text that is raised contains a fragment that the page quotes."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    fragments = [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row)]
    messages = raised_messages()
    assert len(messages) > 80
    for file, text in messages:
        if any(part in text for part in INTERNAL) or not re.search(r"[a-z]{3}", text):
            continue
        assert any(fragment in text for fragment in fragments), f"{file}: {text}"


def test_troubleshooting_lists_nothing_that_does_not_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    sources = [path.read_text() for path in (ROOT / "magi_sink_cp").rglob("*.py")]
    texts = [re.sub(r'"\s+f?"', "", source) for source in sources]  # strings in several lines
    for row in rows:
        for fragment in re.findall(r"`([^`]+)`", row):
            assert any(fragment in text for text in texts), fragment
