# Every target sets up what it needs: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
ARGS ?=
# gpu.sh needs a GPU, imagenet.py the images, and train_ makes models.
BENCH ?= $(filter-out _% train_% gpu imagenet,$(notdir $(basename $(wildcard benchmarks/*.py))))

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo demo-customize test quality docs bench figures clean

help:
	@echo "make demo     run the demo (ARGS='--help' shows its options)"
	@echo "make demo-customize"
	@echo "              teach a small Stable Diffusion a digit it has not seen (ARGS as above)"
	@echo "make test     run the tests (ARGS='tests/hub/test_local.py -k json' picks some)"
	@echo "make quality  check the code's style and its types"
	@echo "make docs     build the API reference into build/reference"
	@echo "make bench    run the benchmarks into benchmarks/results (BENCH=name picks one, ARGS go to it)"
	@echo "make figures  draw the figures of README.md and docs/ from benchmarks/results"
	@echo "make clean    remove caches and build files (not .venv)"

# torch comes first and alone, so that the build comes from whichever wheel index is configured. torchao lies beside
# the other packages: transformers imports it wherever it is found, and only its own tests should pay for that.
$(STAMP): setup.cfg setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[all,test,quality,docs]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target .venv/torchao torchao
	touch $@

demo: $(STAMP)
	$(BIN)/comcat demo $(ARGS)

demo-customize: $(STAMP)
	$(BIN)/comcat demo-customize $(ARGS)

# Two processes with one torch thread each: the tests are many and small. One that a test ends is not replaced: the
# next would begin with the same test.
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/reference.py build/reference

bench: $(STAMP)
	@mkdir -p benchmarks/results
	@set -e; for name in $(BENCH); do \
		echo "== $$name"; \
		PYTHONPATH=.venv/torchao $(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json $(ARGS); \
	done

figures: $(STAMP)
	$(BIN)/python benchmarks/_figures.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
