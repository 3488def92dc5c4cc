PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test minimal docs dist bench lint clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## train a GAN in which one region of the image breaks, and watch it being stopped
	$(BIN)/python -m example_models.gan --fault frozen

test: $(READY)  ## the whole suite, in two processes, each of which computes in one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

OLDEST := .venv-minimal/bin/python
minimal:  ## the suite with the oldest versions that are supported; INDEX gives pip more options, such as an index with torch for CPUs
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-minimal
	$(OLDEST) -m pip install --quiet --disable-pip-version-check $(INDEX) -c constraints-minimal.txt -e '.[plot,examples,cli,tab]' pytest pytest-xdist pyyaml
	OMP_NUM_THREADS=1 $(OLDEST) -W ignore -m pytest --numprocesses 2 --dist loadfile -o filterwarnings= -W ignore

docs: $(READY)  ## the site, in build/docs: links, anchors, formulae and docstrings are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(READY)  ## sdist and wheel in dist/, checked, and every public name imported from the wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -c "from lightning_gendiag import *; import lightning_gendiag; print(lightning_gendiag.__file__)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## every measurement; each script prints a table; some hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pixel_cka
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cosine_mean_similarity
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.manifold_entropy --beta
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.k_star
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.regional_primitives
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.regions
	$(BIN)/python -m benchmarks.classifier
	$(BIN)/python -m benchmarks.training_data
	$(BIN)/python -m benchmarks.memorization
	$(BIN)/python -m benchmarks.codebook_usage
	$(BIN)/python -m benchmarks.round_trip
	$(BIN)/python -m benchmarks.adversary
	$(BIN)/python -m benchmarks.timestep_loss
	$(BIN)/python -m benchmarks.alarms
	$(BIN)/python -m benchmarks.dysfunctions --samples 5000
	$(BIN)/python -m benchmarks.planted_faults --small
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.papers
	$(BIN)/python -m benchmarks.module_copy
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overhead --models vae --arms all --epochs 24
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.scale --exponents

clean:
	rm -rf .venv .venv-minimal build dist runs .pytest_cache .mypy_cache .ruff_cache
