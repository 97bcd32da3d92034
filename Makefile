# make train   installs, trains a small GPT on tiny Shakespeare, shows its loss curve and a sample
# make test    installs and runs the tests
# make docs    builds this documentation as a site, build/site
# make slow    runs the tests that take minutes each
# make chaos   kills and damages runs some hundred times and counts what is lost
# make gpu     on a machine with a GPU: parity tests at full size, then every benchmark that wants one
# make tune    on a machine with a GPU: times other tiles for the kernels than those shipped
# The first five work in .venv of their own and install only once. PYTHON=python3.12 make train picks another Python.

# So that a command whose output goes through tee fails where it fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
RUN := runs/shakespeare_char

# make gpu needs PyTorch for CUDA, pytest, xxhash and matplotlib, no installation; everything it finds
# lies in OUT. NANOGPT=PATH compares with that checkout too.
OUT ?= benchmarks/results/gpu
MODELS ?= gpt2 gpt2-medium gpt2-xl

# The one line of pip's that says what it is at, written over by the next; where nobody looks on, only
# the downloads of 10 MB and more.
PROGRESS = while read -r line; do \
	if [ -t 1 ]; then printf '\r\033[K   %.76s' "$$line"; \
	elif [[ $$line =~ ^Downloading.*\([0-9]{2}.*MB ]]; then echo "   $$line"; fi; \
	done; if [ -t 1 ]; then printf '\r\033[K'; fi
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

.PHONY: train test docs slow chaos gpu gpu-tests tune clean

train: .venv/.train
	@echo "== Preparing tiny Shakespeare (1.1 MB, in the package)"
	@$(BIN)/gpt2-triton prepare shakespeare_char
	@echo "== Training a character-level GPT; an interrupted run continues where it stopped"
	@$(BIN)/gpt2-triton train configs/shakespeare_char.yaml --resume auto
	@echo "== A sample"
	@$(BIN)/gpt2-triton sample $(RUN) --prompt "ROMEO:" --max_new_tokens 300 --seed 1
	@echo
	@echo "The loss curve is $(RUN)/loss.png. Next, for instance:"
	@echo "  source .venv/bin/activate        # then gpt2-triton alone lists the commands"
	@echo "  gpt2-triton sample $(RUN) --prompt 'KING:' 'To be, or' --temperature 0.6"
	@echo "  gpt2-triton prepare --text YOUR.txt     # then train on it: see README.md"

test: .venv/.test
	@echo "== Running ruff and the tests"
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest

docs: .venv/.docs
	@$(BIN)/sphinx-build -q -W -d build/doctrees docs build/site
	@echo "build/site/index.html"

slow: .venv/.test
	@echo "== The long tests: 12,000 broken shards, 200 kills, sanitizers, every kernel for every GPU"
	@$(BIN)/python -m pytest -m slow

chaos: .venv/.test
	@echo "== About 20 minutes; the random moments come from the seed that is printed"
	@$(BIN)/python tests/chaos.py

.venv/.train: $(SOURCES)
	@$(MAKE) --no-print-directory install EXTRA=train
	@touch $@

.venv/.docs: $(SOURCES)
	@$(MAKE) --no-print-directory install EXTRA=docs
	@touch $@

.venv/.test: $(SOURCES)
	@$(MAKE) --no-print-directory install EXTRA=dev
	@touch $@ .venv/.train .venv/.docs

.PHONY: install
install:
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'error: Python 3.11 or later is needed, $(PYTHON) is {v[0]}.{v[1]}; run: PYTHON=python3.12 make $(MAKECMDGOALS)')"
	@echo "== Installing into .venv (once; a few minutes, most of it PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "error: python -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PIP) setuptools pybind11 | ($(PROGRESS))
	@$(PIP) --no-build-isolation -e '.[$(EXTRA)]' | ($(PROGRESS))

gpu-tests:
	@mkdir -p $(OUT)
	@echo "== Parity of the kernels on this GPU"
	@TRITON_INTERPRET=0 $(PYTHON) -m pytest -q -c /dev/null --rootdir . -m gpu tests/gpu 2>&1 | tee $(OUT)/tests.log

tune:
	@mkdir -p $(OUT)
	@echo "== Other tiles than those shipped"
	@$(PYTHON) benchmarks/kernels.py --tune --out $(OUT) 2>&1 | tee $(OUT)/tune.log

gpu: gpu-tests
	@echo "== Kernel benchmarks"
	@$(PYTHON) benchmarks/kernels.py --out $(OUT) 2>&1 | tee $(OUT)/kernels.log
	@echo "== Training steps: the trainer against compiled PyTorch"
	@$(PYTHON) benchmarks/train_step.py --model $(MODELS) $(if $(NANOGPT),--nanogpt $(NANOGPT)) --out $(OUT) 2>&1 | tee $(OUT)/train_step.log
	@echo "== Generation"
	@$(PYTHON) benchmarks/generation.py --device cuda --out $(OUT) 2>&1 | tee $(OUT)/generation.log

clean:
	rm -rf .venv build *.egg-info gpt2/*.so
