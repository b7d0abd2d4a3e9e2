"""Packages and dependencies; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "magi_sink_cp" / "__init__.py").read_text()
).group(1)

TEST = [
    "accelerate>=1.12",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "matplotlib>=3.7",
    "megatron-core>=0.16; platform_system == 'Linux' and python_version < '3.13'",
    "psutil>=5.9",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.2",
    "setuptools>=77",
    "tqdm>=4.60",
    "transformers>=4.57",
    "triton>=3.4; platform_system == 'Linux'",
    "wheel",
]

setup(
    name="magi-sink-cp",
    version=VERSION,
    description="Exact attention with learnable sinks, on one device and across ranks",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["magi_sink_cp", "magi_sink_cp.*"]),
    package_data={"magi_sink_cp": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "numpy>=1.24"],
    extras_require={
        # There is no extra for FlashAttention-3: xformers 0.0.34, which holds it, pins torch 2.10.
        # `make fa3` installs it beside any torch.
        "transformers": ["transformers>=4.57"],
        "fa4": ["flash-attn-4>=4.0.0b36"],  # a pre-release, which naming one allows
        "test": TEST,
        "dev": [*TEST, "mypy>=1.15", "ruff>=0.11"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    },
)
