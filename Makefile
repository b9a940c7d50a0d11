PYTHON ?= python3
METHOD ?= dino
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow lint bench evidence clean
.DELETE_ON_ERROR:

## make demo [METHOD=dino]: train, evaluate and draw on the embedded data, in minutes on a CPU
demo: .venv/installed
	$(if $(EXTRA_$(METHOD)),$(BIN)/pip install --quiet -e '.[$(EXTRA_$(METHOD))]')
	cd $(METHOD) && ../$(BIN)/python main.py $(DEMO_$(METHOD))
DEMO_dino := --arch vit_small
DEMO_swav :=
DEMO_deepcluster :=
DEMO_resmlp :=
DEMO_xcit :=
DEMO_paws := --sel few_labels
DEMO_msn :=
DEMO_contriever :=
# packages that only one method needs
EXTRA_contriever := contriever

## make test: format, lint and the whole test suite without the long tests and the cluster
test: lint
	$(PYTEST) -m "not slow and not slurm"

## make test-slow: the long tests (kill and resume, torch.compile) and those on a real SLURM cluster
test-slow: .venv/installed-test
	$(PYTEST) -m "slow or slurm"

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

## make bench: every benchmark, compared side by side; JSON files in build/bench
bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/run_all.py --out build/bench

## make evidence [METHOD=dino] [EVIDENCE_FLAGS=...]: repeat the small experiments of the method's README
evidence: .venv/installed
	$(if $(EXTRA_$(METHOD)),$(BIN)/pip install --quiet -e '.[$(EXTRA_$(METHOD))]')
	$(BIN)/python tests/evidence/$(METHOD).py --out build/evidence/$(METHOD) $(EVIDENCE_FLAGS)

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
