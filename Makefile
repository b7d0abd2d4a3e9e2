# make train    set up, then train a small sink-attention model, context-parallel, and verify it
# make test     set up, then run the whole test suite in WORKERS processes (default 2)
# make stress   draw random cases for MINUTES minutes (default 10) and print a reproducer for a failure
# make fa3      add FlashAttention-3 for Hopper GPUs to the environment
# make integrations  add torchtitan, TRL and PEFT to the environment, and test what is made for them,
#                    and Trainer on four ranks
# make docs     build the documentation site into site/
# make extras   check that pip can resolve every extra
# make lint     ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Every GPU, or two CPU ranks.
RANKS = $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")

MINUTES ?= 10
WORKERS ?= 2

.PHONY: train test stress fa3 integrations docs extras lint clean

train: $(VENV)/.installed
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) scripts/train.py --verify

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

stress: $(VENV)/.installed
	$(BIN)/python -m tests.stress --minutes $(MINUTES)

# xformers 0.0.34 holds FlashAttention-3. It pins torch 2.10 and works with every torch from 2.10 on.
fa3: $(VENV)/.installed
	$(BIN)/python -m pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12

# torchtitan asks for a datasets that asks for an older huggingface_hub than transformers' newest does.
# It works with the newest, so it is installed without what it asks for.
integrations: $(VENV)/.installed
	$(BIN)/python -m pip install --no-deps torchtitan==0.3.0 torchdata==0.11.0 spmd_types==0.2.3
	$(BIN)/python -m pip install trl==1.16.0 peft tyro tensorboard einops
	INTEGRATIONS=1 $(BIN)/python -m pytest tests/integrations/test_torchtitan.py \
		tests/integrations/test_trl.py tests/integrations/test_trainer.py \
		tests/integrations/test_train_gpt_oss.py \
		tests/integrations/test_transformers_ranks.py::test_lora \
		tests/unit/test_documents.py -k "not test_commands"

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

EXTRAS := transformers fa4 test dev docs
extras: $(VENV)/.installed
	for extra in $(EXTRAS); do \
		$(BIN)/python -m pip install --dry-run --quiet --no-build-isolation ".[$$extra]" || exit 1; \
	done
	@echo "every extra can be resolved: $(EXTRAS)"

lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# If your Python has torch, it is reused: its site-packages are added to the venv by a .pth file, which
# also works if that Python is itself a venv's. Otherwise the pinned torch is installed first, so that
# no other package's requirement chooses its build.
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
