# make train   set up, then train a small sink-attention model, context-parallel, and verify it against one rank
# make test    set up, then run the whole test suite
# make lint    ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Every GPU, or two CPU ranks.
RANKS = $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) scripts/train.py --verify

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An interpreter that has torch already lends it to the venv (also if it lives in a venv itself, which --system-site-packages alone does
# not see). Otherwise torch is installed first and by itself, pinned, so that no other package's requirement chooses its build.
SITE_PACKAGES = import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))
$(VENV)/.installed: setup.py pyproject.toml
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		$(PYTHON) -c '$(SITE_PACKAGES)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet "$(TORCH)"; fi
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
