PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow lint shape bench evidence claims clean
.DELETE_ON_ERROR:

## make demo [METHOD=dino]: train, evaluate and draw on the embedded data, in minutes on a CPU
# Packages that only one method needs are an extra of its name.
demo: METHOD := $(or $(METHOD),dino)
demo: .venv/installed
	$(if $(call has_extra,$(METHOD)),$(BIN)/pip install --quiet -e '.[$(METHOD)]')
	cd $(METHOD) && ../$(BIN)/python main.py
has_extra = $(shell grep -E '^$(1) = \[' pyproject.toml)

## make test [METHOD=dino] [CPU=avx2]: format, lint and the test suite, or that of one method, without long tests and
## the cluster; CPU=default (SSE) or avx2: with no more than these instructions, as on another processor
test: lint
	$(if $(CPU),ATEN_CPU_CAPABILITY=$(CPU) ONEDNN_MAX_CPU_ISA=$(ONEDNN_$(CPU))) $(PYTEST) -m "not slow and not slurm" $(if $(METHOD),$(wildcard tests/$(METHOD) tests/golden/test_$(METHOD)*.py))

ONEDNN_default := SSE41
ONEDNN_avx2 := AVX2

## make test-slow: the long tests (kill and resume, torch.compile) and those on a real SLURM cluster
test-slow: .venv/installed-test
	$(PYTEST) -m "slow or slurm"

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

## make shape: sizes, repetition and names of the code beside their bars
shape: .venv/installed-test
	$(BIN)/python tests/shape.py

## make bench: every benchmark, compared side by side; JSON files in build/bench
bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/run_all.py --out build/bench

## make evidence [METHOD=dino] [EVIDENCE_FLAGS=...]: repeat the small experiments of the method's README
evidence: METHOD := $(or $(METHOD),dino)
evidence: .venv/installed
	$(if $(call has_extra,$(METHOD)),$(BIN)/pip install --quiet -e '.[$(METHOD)]')
	$(BIN)/python -m tests.evidence.$(METHOD) --out build/evidence/$(METHOD) $(EVIDENCE_FLAGS)

## make claims: what the stored experiments say about the claims of all papers, also into the READMEs and RESULTS.md
claims: .venv/installed-test
	$(BIN)/python -m tests.evidence.claims --write

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build
