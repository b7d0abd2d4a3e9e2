"""The list of backends, the choice among them, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import magi_sink_cp
from magi_sink_cp import attention_with_sink, backends
from magi_sink_cp.kernels.backends import fa3, registry
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import Backend, KernelRequest


def test_every_backend_is_listed_with_a_reason():
    listed = {info.name: info for info in backends()}
    assert list(listed) == ["fa3", "fa4", "fa2", "aten", "ffa", "cpu"]
    assert listed["cpu"].available
    for info in listed.values():
        assert info.available == (info.reason == "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["fa3", "fa4", "fa2", "aten"])
def test_a_named_backend_that_cannot_run_says_why(name):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(
        ValueError, match=f"backend='{name}' is not available: torch sees no CUDA GPU"
    ):
        attention_with_sink(q, q, q, backend=name)


class _Picky(Backend):
    """Available, and runs nothing."""

    name = "picky"

    def unavailable(self):
        return None

    def unsupported(self, q, call, head_dim_v=None):
        return "it runs nothing"

    def _forward(self, *_):
        raise AssertionError

    def _backward(self, *_):
        raise AssertionError


def test_auto_passes_over_what_cannot_run_the_call_and_logs_one_line(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_AUTOMATIC", (_Picky(), registry.CpuBackend()))
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.setattr(registry, "_selected", {})
    q = torch.randn(1, 4, 2, 8)
    with caplog.at_level(logging.INFO, logger="magi_sink_cp"):
        for _ in range(3):
            attention_with_sink(q, q, q)
    assert [record.message for record in caplog.records] == [
        "attention runs on cpu (picky: it runs nothing)"
    ]
    monkeypatch.setattr(registry, "_AUTOMATIC", (_Picky(),))
    monkeypatch.setattr(registry, "_BY_NAME", {"picky": _Picky()})
    monkeypatch.setattr(registry, "_selected", {})
    with pytest.raises(ValueError, match="no backend can run this call: picky: it runs nothing"):
        attention_with_sink(q, q, q)
    with pytest.raises(ValueError, match="backend='picky' cannot run this call: it runs nothing"):
        attention_with_sink(q, q, q, backend="picky")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "float16 or torch.bfloat16, and q is torch.float32"),
        ({"head_dim": 20}, "multiple of 8, at most 256, and q has 20"),
        ({"head_dim": 264}, "multiple of 8, at most 256, and q has 264"),
    ],
)
def test_what_flash_attention_does_not_take(change, message):
    class OnCuda:
        """Stands in for a CUDA tensor on a machine without one."""

        device = torch.device("cuda")
        dtype = change.get("dtype", torch.bfloat16)
        shape = (1, 4, 2, change.get("head_dim", 64))

    call = KernelRequest(make_params(8, None, False, (-1, -1), 0.0, False))
    assert message in registry.AtenBackend().unsupported(OnCuda(), call)
    on_cpu = torch.empty(1, 4, 2, 64, dtype=torch.bfloat16)
    assert "and q is on cpu" in registry.AtenBackend().unsupported(on_cpu, call)


def test_aten_names_softcap():
    class OnCuda:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 4, 2, 64)

    call = KernelRequest(make_params(8, None, False, (-1, -1), 5.0, False))
    assert "it has no softcap, and the call sets softcap=5.0" in registry.AtenBackend().unsupported(
        OnCuda(), call
    )


def test_a_broken_flash_attn_3_is_not_passed_over_in_silence(monkeypatch, tmp_path):
    """Half an installation: the package is there and does not load.

    It is the reason, and no other source is tried in its place.
    """
    package = tmp_path / "flash_attn_3"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fa3, "_registered", lambda: False)
    with pytest.raises(
        fa3.NotUsableError, match="flash_attn_3 is installed but does not load: libcudart.so.13"
    ):
        fa3._load()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn_3"]:
        del sys.modules[name]


@pytest.mark.parametrize("has_folder", [False, True])
def test_an_xformers_without_the_extension_says_what_to_install(monkeypatch, tmp_path, has_folder):
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('xformers must not be imported')")
    if has_folder:
        (package / "flash_attn_3").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fa3, "_registered", lambda: False)
    with pytest.raises(
        fa3.NotUsableError,
        match=r"no flash_attn_3/_C\.so .*pip install --no-deps xformers==0\.0\.34",
    ):
        fa3._load()


def test_importing_the_package_is_quiet_and_imports_no_extra():
    """No prints, no CUDA context, no optional package at import time."""
    code = (
        "import sys, magi_sink_cp, torch; assert not torch.cuda.is_initialized(); "
        "extras = {'xformers', 'flash_attn', 'flash_attn_3', 'matplotlib', 'numpy.testing', "
        "'transformers'}; "
        "print(sorted(extras & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_the_package_works_without_triton():
    """On a CPU, Triton is not needed: the twins run, and only a kernel launch would name it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from magi_sink_cp import attention_with_sink\n"
        "from magi_sink_cp.kernels.merge import merge_triton\n"
        "q = torch.randn(1, 4, 2, 8, requires_grad=True)\n"
        "attention_with_sink(q, q, q, torch.randn(1, 2, requires_grad=True)).sum().backward()\n"
        "from magi_sink_cp.kernels.protocol import nothing_seen\n"
        "try:\n    merge_triton([nothing_seen(q)], None, q, q)\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "the kernels for CUDA tensors need triton: `pip install triton`"


def test_public_names():
    drop_in = [
        "fa3_func_with_sink", "fa3_varlen_func_with_sink", "fa3_qkvpacked_func_with_sink",
        "fa2_func_with_sink", "fa2_varlen_func_with_sink", "fa2_qkvpacked_func_with_sink",
        "fa2_kvpacked_func_with_sink",
        "fa2_varlen_qkvpacked_func_with_sink", "fa2_varlen_kvpacked_func_with_sink",
        "fa4_func_with_sink", "fa4_varlen_func_with_sink",
    ]  # fmt: skip
    others = [
        "BackendInfo",
        "CPBlueprint",
        "CPPlan",
        "EngineInfo",
        "engines",
        "SinkAttention",
        "make_cp_blueprint",
        "masks",
        "prefetch_plans",
        "attention_with_sink",
        "backends",
        "compat",
        "cp_attention_with_sink",
    ]
    assert sorted(magi_sink_cp.__all__) == sorted(
        [*drop_in, *others, "make_cp_plan", "set_fallback"]
    )
    for name in magi_sink_cp.__all__:
        assert getattr(magi_sink_cp, name).__doc__, f"{name} has no docstring"
