# Developers' commands. Everything runs in .venv inside this folder; nothing is
# written outside it and the temporary folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An editable install knows modules by name, so that one which moves makes another installation.
MODULES := $(shell find blindtail edge cloud orchestrator -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(MODULES)
TOOLS := $(VENV)/.build-tools
PROTOS := $(wildcard proto/blindtail/pb/*.proto)
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto
CODE := blindtail edge cloud orchestrator bench deploy tests
# What the native module is made of, and all C++.
NATIVE := native/CMakeLists.txt $(wildcard native/src/*)
CPP := $(wildcard native/*/*.cpp native/*/*.hpp)
# In CI it must be there, and its warnings are errors; so it must once it has been there.
BUILT := ls $(VENV)/lib/python3*/site-packages/blindtail/he/_native.*.so >/dev/null 2>&1
REQUIRED = $$(if [ -n "$$CI" ] || $(BUILT); then echo required; fi)
COMPILER = command -v "$${CXX:-c++}" || command -v g++ || command -v clang++
JOBS ?= $(shell nproc)
CMAKE_TESTS = $(BIN)/cmake -S native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DBLINDTAIL_MODULE=OFF \
    -DBLINDTAIL_TESTS=ON -DBLINDTAIL_FUZZ=ON -DBLINDTAIL_WERROR=$(if $(CI),ON,OFF) --log-level=WARNING
CTEST = $(BIN)/ctest --output-on-failure --no-tests=error -j $(JOBS)
CMAKE_tests = -DBLINDTAIL_SANITIZE=OFF
CMAKE_sanitized = -DBLINDTAIL_SANITIZE=ON
CMAKE_fuzz = -DBLINDTAIL_SANITIZE=ON -DBLINDTAIL_COVERAGE=ON -DBLINDTAIL_TESTS=OFF
FUZZ_TARGETS = $(basename $(notdir $(wildcard native/fuzz/*_fuzz.cpp)))
# Seconds for each target.
FUZZ_S ?= 60
# One native thread each: numbers are then comparable and processes do not fight.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST ?= $(BIN)/python -m pytest

.PHONY: help setup native tools demo test native-test fuzz format check bench evidence proto docs clean \
        check-format check-lint check-types check-imports check-proto check-docs check-deploy check-containers

help:
	@echo "make setup     install into .venv (exact versions of constraints.txt)"
	@echo "make tools     fetch Debian's Prometheus into .tools for the tests that use it"
	@echo "make demo      the whole system on this machine; results in out/demo"
	@echo "make test      all tests (ARGS='-k name tests/unit' narrows; the C++ ones are then left out)"
	@echo "make native    build the native code again, and show what the compiler says"
	@echo "make native-test  the C++ tests, and once more under the address and undefined behaviour sanitizers"
	@echo "make fuzz      fuzz the C++ that reads what others send, FUZZ_S=60 seconds each target"
	@echo "make format    format Python and C++"
	@echo "make check     format, lint, types, import rules, generated code, docs"
	@echo "make check-containers  container files' install steps in clean root directories (root, minutes)"
	@echo "make bench     short benchmarks, results in bench/results (BENCH='he roundtrip' picks)"
	@echo "make evidence  re-run whatever the quoted results come from, where its sources changed"
	@echo "make proto     regenerate blindtail/pb from proto/"
	@echo "make docs      regenerate docs/metrics.md from the table of metrics"
	@echo "make clean     remove out/ and caches (not .venv)"

setup: $(STAMP)

# setuptools: for requirements that have no wheel for some Python.
$(TOOLS): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    cmake nanobind ninja scikit-build-core setuptools
	@touch $(TOOLS)

# An editable install never builds while it is imported; it is built here when its sources have changed.
$(STAMP): pyproject.toml $(TOOLS) $(NATIVE)
	BLINDTAIL_NATIVE=$(REQUIRED) $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(BUILT) || echo "*** No native code: it could not be built, and 'make native' shows why. All works without" \
	    "it, but encrypted tails are evaluated by the slower backend 'seal'. ***"
	@rm -f $(VENV)/.installed* && touch $(STAMP)

# What was found out about the compiler is found out anew.
native: $(TOOLS)
	rm -f build/*/CMakeCache.txt
	BLINDTAIL_NATIVE=required $(BIN)/python -m pip install --verbose --disable-pip-version-check \
	    -c constraints.txt --no-build-isolation --no-deps -e .

# Tried once; what cannot be fetched is skipped by the tests. 'make tools' tries again.
.tools/.tried: | $(STAMP)
	$(BIN)/python -m tests.tools
	@mkdir -p .tools && touch $@

tools: $(STAMP)
	$(BIN)/python -m tests.tools

demo: $(STAMP)
	$(BIN)/blindtail demo

test: $(STAMP) .tools/.tried $(if $(ARGS),,native-test)
	$(ONE_THREAD) $(PYTEST) $(or $(ARGS),-n 2 --dist loadgroup)

native-test: $(TOOLS)
	@if $(COMPILER) >/dev/null || [ -n "$$CI" ]; then $(MAKE) --no-print-directory build/tests build/sanitized; \
	else echo "*** SKIPPED: the C++ tests need a compiler ***"; fi

# Finds stay in build/fuzz/found, and the next run begins with them.
fuzz: $(TOOLS)
	@if $(COMPILER) >/dev/null || [ -n "$$CI" ]; then \
	    $(MAKE) --no-print-directory build/fuzz && for target in $(FUZZ_TARGETS); do \
	        echo "$$target, $(FUZZ_S) s"; build/fuzz/$$target -max_total_time=$(FUZZ_S) -max_len=8192 -grow=1 \
	            $(FUZZ_ARGS) build/fuzz/found/$$target native/fuzz/corpus/$$target || exit 1; done; \
	else echo "*** SKIPPED: fuzzing needs a compiler ***"; fi

.PHONY: build/tests build/sanitized build/fuzz
build/tests build/sanitized build/fuzz:
	$(CMAKE_TESTS) $(CMAKE_$(@F)) -B $@
	$(BIN)/cmake --build $@ --parallel $(JOBS)
	$(CTEST) --test-dir $@

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(CPP)

check: check-format check-lint check-types check-imports check-proto check-docs check-deploy

check-format: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run --Werror $(CPP)

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
