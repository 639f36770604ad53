# Needs make and Python >= 3.10, nothing else. `make PYTHON=/path/to/python3.12 demo` chooses the interpreter.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first that starts, is new enough and can make a virtual environment. 3.11 first: the pins were tried with it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 \
	&& echo "$$python" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: help demo demo-detector test check schemas bench clean

help:
	@echo 'make demo    install and check the example: examples/digits/gate.toml'
	@echo 'make demo-detector  likewise: examples/digit-detector/gate.toml'
	@echo 'make test    install and run the tests'
	@echo 'make check   lint, types, workflows and schemas'
	@echo 'make schemas write the JSON Schemas anew'
	@echo 'make bench   what the gate itself costs'
	@echo 'make clean   remove what these made, the virtual environment included'

# One stamp per set of extras, made anew when the project's metadata or the pins change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing trt-gate[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'no Python >= 3.10 that can make a virtual environment; set PYTHON=' >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

demo: $(VENV)/.installed-demo
	$(BIN)/gate check examples/digits/gate.toml --seal dist

demo-detector: $(VENV)/.installed-demo
	$(BIN)/gate check examples/digit-detector/gate.toml --seal dist

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) -m 'not gpu'

# TensorRT's types as published cannot be read by mypy: a keyword as a parameter's name, a default before a parameter
# without one, and a variable that hides bool. These three are mended on the way.
$(VENV)/typings/tensorrt/__init__.pyi: constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/stubs \
		--constraint constraints.txt tensorrt-stubs
	@mkdir -p $(@D)
	@sed -e 's/power: Weights = None, channel_axis: int)/power: Weights = None, channel_axis: int = ...)/' \
		-e 's/\bin: list\[/in_: list[/g' -e '/^bool: /d' $(VENV)/stubs/tensorrt_bindings/tensorrt.pyi > $@

check: $(VENV)/.installed-lint $(VENV)/typings/tensorrt/__init__.pyi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/typings $(BIN)/mypy
	$(BIN)/zizmor --offline --quiet --persona regular .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/gate schema spec | cmp - schemas/gate.schema.json
	$(BIN)/gate schema report | cmp - schemas/report.schema.json
	$(BIN)/gate schema baseline | cmp - schemas/baseline.schema.json
	$(BIN)/gate schema trust | cmp - schemas/trust.schema.json
	$(BIN)/gate schema verdict | cmp - schemas/verdict.schema.json
	$(BIN)/gate schema approval | cmp - schemas/approval.schema.json
	$(BIN)/gate schema ledger | cmp - schemas/ledger.schema.json
	$(BIN)/gate schema metadata | cmp - metadata_schema.json
	$(BIN)/check-jsonschema --check-metaschema schemas/*.json metadata_schema.json

# Written from the types; `make check` says when they are not current.
schemas: $(VENV)/.installed-lint
	$(BIN)/gate schema spec > schemas/gate.schema.json
	$(BIN)/gate schema report > schemas/report.schema.json
	$(BIN)/gate schema baseline > schemas/baseline.schema.json
	$(BIN)/gate schema trust > schemas/trust.schema.json
	$(BIN)/gate schema verdict > schemas/verdict.schema.json
	$(BIN)/gate schema approval > schemas/approval.schema.json
	$(BIN)/gate schema ledger > schemas/ledger.schema.json
	$(BIN)/gate schema metadata > metadata_schema.json

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .gate dist build examples/*/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
