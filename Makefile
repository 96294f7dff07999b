# make demo: the whole job on real cells.  make test: the suite.  make lint: style, types, imports.
# make test-pages: the atlas in Chromium.  make test-slow: all that takes long.
# make test-jobs: the demo, a recipe, a run killed in four ways, a submitted job, a lost node, a store on S3.
# make gpu: what needs a GPU, in eight minutes; on a CPU in small sizes.
# make docs: the pages in site/, with the tutorials as they ran.
# Each makes .venv on its first call, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# every test process, actor and command would compile all modules anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-units test-ray test-pages test-jobs test-slow gpu docs lint format clean help

help:
	@sed -n '1,6p' Makefile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python infra/install.py
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/scsae demo

# the tests without Ray share the cores, with one thread each; those with Ray mostly wait, and run beside them
test: $(STAMP)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-units test-ray

# TileDB-SOMA has once taken down a process that had run thousands of other tests, so its tests have one of their own; and a
# process that is lost ends the tests, which would wait for it forever otherwise
SOMA := tests/feature_store/cells/test_soma.py tests/pipelines/test_soma.py
UNITS := -m 'not slow and not gpu and not ray and not browser'
test-units: $(STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 POLARS_MAX_THREADS=2 \
		$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 $(UNITS) $(SOMA:%=--ignore=%)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 POLARS_MAX_THREADS=2 $(BIN)/python -m pytest $(UNITS) $(SOMA)

test-ray: $(STAMP)
	$(BIN)/python -m pytest tests/pipelines -m 'ray and not slow and not gpu and not browser'

test-pages: $(STAMP)
	OMP_NUM_THREADS=1 POLARS_MAX_THREADS=2 \
		$(BIN)/python -m pytest -n auto --dist loadfile -m 'browser and not slow and not gpu'

test-jobs: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu' \
		--deselect tests/e2e/test_kill.py::test_twenty_random_kills_change_nothing \
		--deselect tests/e2e/test_submit.py::TestCrowd \
		tests/e2e/test_demo.py tests/e2e/test_kill.py tests/e2e/test_submit.py tests/e2e/test_two_nodes.py \
		tests/e2e/test_recipe.py \
		'tests/feature_store/storage/test_object_storage.py::test_every_stage_runs_on_object_storage_and_a_second_time_does_nothing[moto]'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not gpu'

gpu:
	infra/gpu/check.sh

docs: $(STAMP)
	$(BIN)/python docs/site/build_site.py --out site

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
