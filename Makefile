# Developers' commands. Everything runs in .venv inside this folder; nothing is
# written outside it and the temporary folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/blindtail/pb/*.proto)
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto
CODE := blindtail edge cloud orchestrator bench deploy tests
# One native thread each: numbers are then comparable and processes do not fight.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST ?= $(BIN)/python -m pytest

.PHONY: help setup tools demo test check bench evidence proto docs clean \
        check-format check-lint check-types check-imports check-proto check-docs check-deploy check-containers

help:
	@echo "make setup     install into .venv (exact versions of constraints.txt)"
	@echo "make tools     fetch Debian's Prometheus into .tools for the tests that use it"
	@echo "make demo      the whole system on this machine; results in out/demo"
	@echo "make test      all tests"
	@echo "make check     format, lint, types, import rules, generated code, docs"
	@echo "make check-containers  container files' install steps in clean root directories (root, minutes)"
	@echo "make bench     short benchmarks, results in bench/results (BENCH='he roundtrip' picks)"
	@echo "make evidence  re-run whatever the quoted results come from, where its sources changed"
	@echo "make proto     regenerate blindtail/pb from proto/"
	@echo "make docs      regenerate docs/metrics.md from the table of metrics"
	@echo "make clean     remove out/ and caches (not .venv)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e ".[dev]"
	@touch $(STAMP)

# Tried once; what cannot be fetched is skipped by the tests. 'make tools' tries again.
.tools/.tried: | $(STAMP)
	$(BIN)/python -m tests.tools
	@mkdir -p .tools && touch $@

tools: $(STAMP)
	$(BIN)/python -m tests.tools

demo: $(STAMP)
	$(BIN)/blindtail demo

test: $(STAMP) .tools/.tried
	$(ONE_THREAD) $(PYTEST) $(ARGS)

check: check-format check-lint check-types check-imports check-proto check-docs check-deploy

check-format: $(STAMP)
	$(BIN)/ruff format --check $(CODE)

check-lint: $(STAMP)
	$(BIN)/ruff check $(CODE)

check-types: $(STAMP)
	$(BIN)/mypy

check-imports: $(STAMP)
	$(BIN)/lint-imports

check-proto: $(STAMP)
	@rm -rf out/proto-check && mkdir -p out/proto-check
	$(PROTOC) --python_out=out/proto-check --pyi_out=out/proto-check --grpc_python_out=out/proto-check $(PROTOS)
	@for made in out/proto-check/blindtail/pb/*; do \
	    diff -u blindtail/pb/$$(basename $$made) $$made \
	    || { echo "blindtail/pb is not what proto/ generates: run 'make proto'"; exit 1; }; done

check-docs: $(STAMP)
	$(PYTEST) -q tests/unit/test_docs.py tests/unit/test_metrics_files.py

check-deploy: $(STAMP)
	$(BIN)/python -m deploy.checks files

# No image is built: install steps run in clean root directories made by debootstrap. Needs root.
check-containers: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m deploy.checks containers

bench: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m bench all $(BENCH)

evidence: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m bench evidence

docs: $(STAMP)
	$(BIN)/python -m blindtail.metrics docs/metrics.md

proto: $(STAMP)
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
