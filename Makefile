# On a fresh machine with Python 3.11 or newer, make and pip: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test standin audit dist gpu-check clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nanogauge needs Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 2; }
	@driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); \
	  [ -z "$$driver" ] || [ "$${driver%%.*}" -ge 580 ] || [ -n "$(OLD_DRIVER)" ] || \
	  { echo "torch for CUDA 13 (4.6 GB) needs NVIDIA driver 580 or newer, here is $$driver: update" \
	    "it first, or train on the CPU: make setup OLD_DRIVER=1" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Train the demo; deletes an earlier one.
demo: setup
	@rm -rf runs/demo
	$(BIN)/python train.py configs/demo.toml

test: setup
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench/report.py
	$(BIN)/mypy bench/sample.py
	$(BIN)/python -m pytest -m 'not gpu and not alone and not standin' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m alone

# Run the CUDA branch without a GPU: torch for CUDA (4.7 GB, kept in the user's cache folder) on a
# stand-in for an RTX 4070.
standin:
	PYTHON=$(PYTHON) bash tests/standin/run.sh -m pytest tests/standin -n 2 --dist loadfile

# Check the pinned packages for known vulnerabilities (needs the network).
audit:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  $(PYTHON) -m venv "$$folder" && \
	  "$$folder/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit && \
	  "$$folder/bin/pip-audit" --strict --disable-pip --no-deps --requirement constraints.txt

# Build wheel and sdist into dist/, check them, and run the installed command in an environment of its own
# (needs the network).
dist:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && rm -rf dist build && \
	  $(PYTHON) -m venv "$$folder/tools" && $(PYTHON) -m venv "$$folder/user" && \
	  "$$folder/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine && \
	  "$$folder/tools/bin/python" -m build --outdir dist . >/dev/null && \
	  "$$folder/tools/bin/twine" check --strict dist/* && \
	  "$$folder/user/bin/python" -m pip install --quiet --disable-pip-version-check dist/*.whl && \
	  "$$folder/user/bin/nanogauge" plan configs/rtx4070_fineweb.toml --gpu "RTX 4070" --json >/dev/null && \
	  ls -l dist

# Check an NVIDIA GPU and measure it, each part in at most 8 minutes: gpu-check.json, gpu-check.md.
# NANOGPT=FOLDER, a checkout of nanoGPT, is measured beside it.
PART ?= arithmetic speed
gpu-check: setup
	for part in $(PART); do \
	  $(BIN)/python tests/gpu_check.py $$part $(if $(NANOGPT),--nanogpt "$(NANOGPT)") || exit; done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
