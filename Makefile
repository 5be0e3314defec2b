# Two commands for a fresh machine: `make quickstart` and `make test`. Both do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# The repository root stays off sys.path, so that the folder kernels/ is never importable as "kernels".
export PYTHONSAFEPATH := 1
# One mount point under which mypy sees both packages by their import names.
TYPES := build/types

.PHONY: help venv quickstart test test-gpu test-oldest check schema models kernels-aot kernels-aot-oldest pictures clean
help:
	@echo "make venv        create $(VENV) with the project and everything it needs"
	@echo "make quickstart  fine-tune the embedded model on 2 CPU ranks under ZeRO-3, dense and sparse, and compare"
	@echo "make test        run the test suite (installs Chromium where there is no browser, as root with apt)"
	@echo "make test-gpu    run the tests that need a GPU"
	@echo "make test-oldest run the suite, or TESTS=..., with the oldest versions that pyproject.toml promises"
	@echo "make check       lint (ruff) and type-check (mypy)"
	@echo "make schema      write configs/schema.json, by which editors complete and check run files"
	@echo "make models      write the table of supported model types in docs/models.md"
	@echo "make kernels-aot compile every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed)"
	@echo "make kernels-aot-oldest  the same with the oldest supported Triton, in an environment of its own"
	@echo "make pictures    draw the README's pictures again, from committed results"

venv: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about two minutes the first time)..."
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: venv
	@$(BIN)/python benchmarks/quickstart.py

# Two at a time (tests/lib/support/workers.py says which).
JOBS ?= 2
test: venv
	@.ci/browser
	@$(BIN)/pytest -n $(JOBS)

# The tests that need a GPU, and no others.
test-gpu: venv
	@SPARSELORA_TEST_GPU=1 $(BIN)/pytest -m gpu

# The versions that pyproject.toml promises at least, in an environment of their own (6 GB: this torch comes with CUDA).
test-oldest: $(OLDEST)/.ready
	@$(OLDEST)/bin/pytest -n $(JOBS) $(TESTS)
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest supported versions into $(OLDEST)..."
	@$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	@touch $@

check: venv
	@$(BIN)/ruff check .
	@mkdir -p $(TYPES) && ln -sfn $(CURDIR)/kernels $(TYPES)/sparselora_kernels && ln -sfn $(CURDIR)/sparselora_dist $(TYPES)/sparselora_dist
	@MYPYPATH=$(TYPES) $(BIN)/mypy --no-error-summary -p sparselora_dist -p sparselora_kernels && echo "mypy: no issues"

# The table of docs/models.md.
models: venv
	@PYTHONPATH=tests/lib $(BIN)/python tests/lib/support/every_type.py docs/models.md

schema: venv
	@$(BIN)/sparselora-dist schema --output configs/schema.json

# AOT="--arch 90 --only gated" is a part of it.
kernels-aot: venv
	@env -u TRITON_INTERPRET $(BIN)/python -m sparselora_kernels.aot $(AOT)

# The kernels alone need torch, Triton and numpy (Triton 3.6's interpreter breaks with numpy 2.4). torch's own release of
# this age comes with CUDA, 6 GB; any torch from 2.11 on will do: TORCH=...
TORCH ?= torch==2.11.*
OLDEST_TRITON := build/oldest-triton
kernels-aot-oldest: $(OLDEST_TRITON)/.ready
	@mkdir -p $(TYPES) && ln -sfn $(CURDIR)/kernels $(TYPES)/sparselora_kernels
	@env -u TRITON_INTERPRET PYTHONPATH=$(TYPES) $(OLDEST_TRITON)/bin/python -m sparselora_kernels.aot $(AOT)
$(OLDEST_TRITON)/.ready:
	@test -x $(OLDEST_TRITON)/bin/python || $(PYTHON) -m venv $(OLDEST_TRITON)
	@$(OLDEST_TRITON)/bin/python -m pip install -q "$(TORCH)" "triton==3.6.*" "numpy<2.4"
	@touch $@

pictures: venv
	@$(BIN)/python benchmarks/pictures.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist runs *.egg-info
