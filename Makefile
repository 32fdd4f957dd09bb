# How does one try and check the project? `make demo` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# -- The machine: say `make demo PYTHON=python3.12 VENV=/somewhere RANKS=1` to change it --
VENV ?= .venv
# `make venv DEVICE=cpu TORCH_INDEX=URL` leaves out what only GPUs need, 4 GB of it: such wheels of torch have an index
# of their own, which PyTorch's page on installing names.
DEVICE ?= cuda
TORCH_INDEX ?=
PYTHON ?= $(shell for candidate in python3.12 python3.11 python3; do \
    $$candidate -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
    2>/dev/null && echo $$candidate && break; done)
# uv needs half the time of pip: INSTALL="uv pip install --python .venv/bin/python"
INSTALL ?= python -m pip install --disable-pip-version-check --no-input
RANKS ?=
JOBS ?= 2
DATA ?= data/demo
RUN ?= runs/demo

# -- The steps of the demo --
build_labelled  = python -m data_prep build scenes --out $(DATA)/labelled --count 4000 --seed 1
build_captioned = python -m data_prep build scenes --out $(DATA)/captioned --count 4000 --seed 2
pretrain        = ENV=$(VENV) RANKS=$(RANKS) jobs/local/pretrain.sh --recipe m3i.demo --out $(RUN) \
                  --data labelled=$(DATA)/labelled/train captioned=$(DATA)/captioned/train
evaluate        = python -m pretrain.evaluate $(RUN) --data $(DATA)/labelled --out $(RUN)/evaluation.json
export_weights  = python -m pretrain.export $(RUN) --to internimage
report          = python -m pretrain.report $(RUN)
tests           = python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
installed := $(VENV)/.requirements.txt
wanted_cuda = cat requirements.txt
wanted_cpu  = sed -E '/^(triton|nvidia-|cuda-)/d; s/^(torch|torchvision)==([^ ]+)/\1==\2+cpu/' requirements.txt
index_cpu   = --extra-index-url $(TORCH_INDEX)

.PHONY: demo test lint venv clean help

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(RUN)/report.html ## build scenes, pre-train, evaluate, export, report: minutes, on a CPU or on GPUs
	@echo "[demo] done: open $(RUN)/report.html"

test: $(installed) ## run the tests (ARGS="tests/data -k mask" for some of them, JOBS=8 on eight cores)
	OMP_NUM_THREADS=1 $(tests)

lint: $(installed) ## check style and formatting
	ruff check
	ruff format --check

venv: $(installed) ## make or renew the virtual environment alone

clean: ## remove the demo's data and run
	rm -rf $(DATA) $(RUN)

# The installed list is a copy of what was wanted: a new time stamp alone installs nothing.
$(installed): requirements.txt
	@[[ -n "$(wanted_$(DEVICE))" ]] || { echo "DEVICE=$(DEVICE) is unknown: choose cuda or cpu" >&2; exit 1; }; \
	[[ $(DEVICE) != cpu || -n "$(TORCH_INDEX)" ]] || { echo "TORCH_INDEX is empty and DEVICE=cpu: name the" \
	    "index of PyTorch's CPU wheels, as PyTorch's page on installing has it" >&2; exit 1; }; \
	wanted=$$(mktemp); trap 'rm -f "$$wanted"' EXIT; \
	$(wanted_$(DEVICE)) > "$$wanted"; \
	if cmp -s "$$wanted" $@; then touch -c $@ 2>/dev/null || true; exit 0; fi; \
	if [[ ! -x $(VENV)/bin/python ]]; then \
	    [[ -n "$(PYTHON)" ]] || { echo "no python3.12, python3.11 or python3 here is version 3.11 or 3.12 with" \
	        "venv: install one (Debian and Ubuntu: python3-venv) or name it: make PYTHON=..." >&2; exit 1; }; \
	    echo "[venv] $(PYTHON) makes $(VENV)"; \
	    "$(PYTHON)" -m venv $(VENV); \
	fi; \
	echo "[venv] installs requirements.txt for $(DEVICE) into $(VENV): some GB, a few minutes"; \
	$(INSTALL) -r "$$wanted" $(index_$(DEVICE)); \
	cp "$$wanted" $@

# The held-out manifest is what the builder writes last.
$(DATA)/labelled/heldout/manifest.json: | $(installed)
	@echo "[demo 1/6] builds 4,000 scenes with categories in $(DATA)/labelled"
	$(build_labelled)

$(DATA)/captioned/heldout/manifest.json: | $(installed)
	@echo "[demo 2/6] builds 4,000 scenes with captions in $(DATA)/captioned"
	$(build_captioned)

# The trainer writes checkpoints as it goes and continues from the newest; this mark says that it reached the end.
$(RUN)/finished: $(DATA)/labelled/heldout/manifest.json $(DATA)/captioned/heldout/manifest.json
	@echo "[demo 3/6] pre-trains m3i.demo through the deepspeed launcher into $(RUN); started again, it continues"
	$(pretrain)
	@touch $@

$(RUN)/evaluation.json: $(RUN)/finished
	@echo "[demo 4/6] evaluates on held-out scenes, before and after pre-training"
	$(evaluate)

$(RUN)/exported: $(RUN)/finished
	@echo "[demo 5/6] exports the teacher to InternImage's own format and proves it"
	$(export_weights)
	@touch $@

$(RUN)/report.html: $(RUN)/evaluation.json $(RUN)/exported
	@echo "[demo 6/6] writes the report"
	$(report)
