PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench lint clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## train a GAN in which one region of the image breaks, and watch it being stopped
	$(BIN)/python -m example_models.gan --fault frozen

test: $(READY)  ## the whole suite
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## every measurement; each script prints a table; more than an hour
	$(BIN)/python -m benchmarks.pixel_cka
	$(BIN)/python -m benchmarks.cosine_mean_similarity
	$(BIN)/python -m benchmarks.manifold_entropy --beta
	$(BIN)/python -m benchmarks.k_star
	$(BIN)/python -m benchmarks.classifier
	$(BIN)/python -m benchmarks.regional_primitives
	$(BIN)/python -m benchmarks.alarms
	$(BIN)/python -m benchmarks.dysfunctions --samples 5000
	$(BIN)/python -m benchmarks.planted_faults --small
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.module_copy
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overhead --models vae --arms all --epochs 24
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.scale --exponents

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
