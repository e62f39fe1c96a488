# What a person, a commit hook and CI call:
#   make serve | restart | test | test-clients | test-ray | tokenizer | check | format
#   make bench | bench-gpu | overhead | overload | soak | audit | sbom | clean
#
#   PYTHON=python3.12                                     another interpreter (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu      PyTorch without CUDA (about 200 MB instead of several GB)

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
SITE_PACKAGES = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: serve restart test test-clients test-ray tokenizer check format bench bench-gpu overhead overload soak audit sbom clean

serve: $(VENV)/.serve
	$(BIN)/gunicorn -c gunicorn.conf.py --pid $(VENV)/gunicorn.pid app:app

# New code, settings and model in what `make serve` started, and no request fails.
restart:
	$(BIN)/python reranker/server/restart.py $(VENV)/gunicorn.pid

# Two tests at a time, of different modules for the most part; `python -m pytest tests/test_x.py` takes one after another.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The real SDKs of every client, each in an environment that its makers' pins allow.
test-clients: $(VENV)/clients/.ready $(VENV)/cohere/.ready
	GUNICORN=$(abspath $(BIN)/gunicorn) $(VENV)/clients/bin/python -m pytest -c tests/clients/pytest.ini tests/clients
	GUNICORN=$(abspath $(BIN)/gunicorn) $(VENV)/cohere/bin/python -m pytest -c tests/clients/pytest.ini tests/clients/test_cohere.py

# Several machines, in an environment with Ray.
test-ray: $(VENV)/ray/.ready
	$(VENV)/ray/bin/python -m pytest -c tests/ray/pytest.ini tests/ray

# The true vocabulary, for the tests that want it beside the demo's; they skip without it.
tokenizer: $(VENV)/.dev
	$(BIN)/python -c 'from benchmarks.models import tokenizer; print(tokenizer())'

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.engine

# Needs a GPU, torch and transformers, and no network: the environment where there is one, else $(PYTHON) as it is.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

# Each exits with 1 when a promise of the README is broken. ARGS="--minutes 60" for longer.
overhead: $(VENV)/.bench
	$(BIN)/python -m benchmarks.overhead $(ARGS)

overload: $(VENV)/.bench
	$(BIN)/python -m benchmarks.overload $(ARGS)

soak: $(VENV)/.bench
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Known vulnerabilities of what runs; needs a network that has the advisories (pypi.org itself) and says so where it has not.
audit: $(VENV)/.supply
	$(VENV)/supply/bin/python deploy/supply/audit.py $(SITE_PACKAGES) requirements.txt

# What runs, as CycloneDX 1.6; without a network once its tools are there.
sbom: $(VENV)/.supply
	@set -e; whole=$$(mktemp); trap 'rm -f "$$whole"' EXIT; \
	$(VENV)/supply/bin/cyclonedx-py environment --spec-version 1.6 $(BIN)/python >"$$whole"; \
	$(VENV)/supply/bin/python deploy/supply/sbom.py $(SITE_PACKAGES) requirements.txt sbom.json <"$$whole"

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

# torch goes first and by its exact pin: whatever depends on it then finds it there.
$(VENV)/.serve: requirements.txt $(VENV)/.python
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-eval.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/clients/.ready: tests/clients/requirements.txt $(VENV)/.serve
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

$(VENV)/cohere/.ready: tests/clients/requirements-cohere.txt $(VENV)/.serve
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

# A second PyTorch: what Ray brings must not change what the service is tested with.
$(VENV)/ray/.ready: tests/ray/requirements.txt deploy/requirements-ray.txt requirements.txt $(VENV)/.python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

$(VENV)/.bench: benchmarks/requirements.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt
	@touch $@

$(VENV)/.supply: deploy/supply/requirements.txt $(VENV)/.serve
	$(PYTHON) -m venv $(VENV)/supply
	$(VENV)/supply/bin/python -m pip install --quiet -r $<
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache benchmarks/.cache
