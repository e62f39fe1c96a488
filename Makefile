# Targets for people, commit hooks and CI:
#   make help | serve | restart | test | test-slow | test-clients | test-ray | test-references | tokenizer | check | format
#   make bench | bench-gpu | overhead | overload | soak | audit | sbom | lock | wheel | clean
#
#   PYTHON=python3.12        another interpreter (3.11 or newer)
#   TORCH_INDEX=<address>    another package index for torch: PyTorch's CPU index gives a build without CUDA
#                            (about 200 MB instead of several GB)

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
SITE_PACKAGES = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: help serve restart test test-slow test-clients test-ray test-references tokenizer check format bench bench-gpu overhead overload soak audit sbom lock wheel clean

serve: $(VENV)/.serve
	$(BIN)/gunicorn -c gunicorn.conf.py --pid $(VENV)/gunicorn.pid app:app

# This file's head. `make` alone serves.
help:
	@awk '/^$$/ { exit } { sub(/^# ?/, ""); print }' Makefile

# Load new code, settings and model into the service that `make serve` started, without a failed request.
restart:
	$(BIN)/python reranker/server/restart.py $(VENV)/gunicorn.pid

# Three processes for two cores, because many tests wait for a timeout or a server. A plain `pytest` runs slow tests too.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow" $(ARGS)

# Faults under load, compilers, bodies of 500 MB, long waits: several minutes.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

# The real packages of every client. The Python ones are in two environments, because their version pins exclude each other.
test-clients: export GUNICORN = $(abspath $(BIN)/gunicorn)
test-clients: export NODE_PACKAGES = $(abspath $(VENV)/npm)
test-clients: $(VENV)/clients/.ready $(VENV)/products/.ready $(VENV)/npm/.ready
	$(VENV)/clients/bin/python -m pytest -c tests/clients/pytest.ini -m "not products" tests/clients
	$(VENV)/products/bin/python -m pytest -c tests/clients/pytest.ini -m "products or cohere" tests/clients

# Tests on a cluster of several nodes, in an environment with Ray.
test-ray: $(VENV)/ray/.ready
	$(VENV)/ray/bin/python -m pytest -c tests/ray/pytest.ini tests/ray

# Scores against sentence-transformers and peft, in an environment with both.
test-references: $(VENV)/references/.ready
	$(VENV)/references/bin/python -m pytest -c tests/references/pytest.ini tests/references $(ARGS)

# Qwen3's own vocabulary, for the tests marked [qwen3], which skip without it.
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

# Needs a GPU, torch and transformers, and no network. Uses the environment if it exists, else $(PYTHON) as it is.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --results benchmarks/RESULTS.md

# Each exits with 1 when a promise of the README is broken. ARGS="--minutes 60" runs a longer soak.
overhead: $(VENV)/.bench
	$(BIN)/python -m benchmarks.overhead $(ARGS)

overload: $(VENV)/.bench
	$(BIN)/python -m benchmarks.overload $(ARGS)

soak: $(VENV)/.bench
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Known vulnerabilities of the installed packages. Needs access to the package index that publishes the advisories.
audit: $(VENV)/.supply
	$(VENV)/supply/bin/python deploy/supply/audit.py $(SITE_PACKAGES) requirements.txt

# The installed packages as CycloneDX 1.6; needs no network once its tools are installed.
sbom: $(VENV)/.supply
	@set -e; whole=$$(mktemp); trap 'rm -f "$$whole"' EXIT; \
	$(VENV)/supply/bin/cyclonedx-py environment --spec-version 1.6 $(BIN)/python >"$$whole"; \
	$(VENV)/supply/bin/python deploy/supply/sbom.py $(SITE_PACKAGES) requirements.txt sbom.json <"$$whole"

# The packages of the image, each file by its hash. ARGS=--upgrade takes the newest versions that requirements.txt admits.
lock: $(VENV)/.supply
	$(VENV)/supply/bin/uv pip compile requirements.txt --output-file requirements.lock --custom-compile-command "make lock" \
		--quiet --universal --python-version 3.11 --generate-hashes $(ARGS)

# The wheel and the source archive of a release, in dist/.
wheel: $(VENV)/.dev
	$(BIN)/python -m hatchling build

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

# torch is installed first and by its exact pin, so that no dependency draws another build in.
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

# Two files of Open WebUI's wheel are kept, not all 250 MB and their dependencies.
OPEN_WEBUI := $(addprefix open_webui/retrieval/models/,external.py base_reranker.py)
$(VENV)/products/.ready: $(addprefix tests/clients/requirements-products,.txt -infinity.txt -open-webui.txt) $(VENV)/.serve
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $(word 1,$^)
	$(@D)/bin/python -m pip install --quiet --no-deps -r $(word 2,$^)
	@set -e; wheels=$$(mktemp -d); trap 'rm -rf "$$wheels"' EXIT; \
	$(@D)/bin/python -m pip download --quiet --no-deps --dest "$$wheels" -r $(word 3,$^); \
	$(@D)/bin/python -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2], sys.argv[3:])' \
		"$$wheels"/*.whl $(@D)/open-webui $(OPEN_WEBUI)
	@touch $@

# Without npm nothing is installed, and the tests of these packages are skipped.
$(VENV)/npm/.ready: $(addprefix tests/clients/npm/,package.json package-lock.json .npmrc)
	@command -v npm >/dev/null || { echo "npm is missing: the tests of the npm packages will be skipped"; exit 0; }; \
	mkdir -p $(@D) && cp $^ $(@D) && (cd $(@D) && npm ci --loglevel=error) && touch $@

# A second PyTorch: Ray's dependencies must not change the versions that the service is tested with.
$(VENV)/ray/.ready: tests/ray/requirements.txt deploy/requirements-ray.txt requirements.txt $(VENV)/.python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

# A second PyTorch, for the same reason.
$(VENV)/references/.ready: tests/references/requirements.txt requirements.txt $(VENV)/.python
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
