PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
# the networks here are so small that more threads only get in each other's way
export OMP_NUM_THREADS ?= 1
# as many tests at a time as there are cores
SIDE_BY_SIDE := -n auto --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test quick lint wheel-test bench-hessian bench-live bench-llc bench-overhead bench-price bench-schedule bench-sweep bench-transitions reliability clean

help:
	@echo "make demo        train a real network with phasewatch watching, and say where to look"
	@echo "make test        all tests, lint and types"
	@echo "make quick       the same without the slow tests"
	@echo "make bench-llc      learning coefficients against exact answers and peers"
	@echo "make bench-live     learning coefficients during training, on reference runs"
	@echo "make bench-hessian  curvature against its peers, in units of one gradient"
	@echo "make bench-overhead  what the signals at every step cost, as a share of the bare step"
	@echo "make bench-price    what a measurement costs, part by part, in gradients of the training batch"
	@echo "make bench-schedule  where schedule='auto' measures, beside as many and four times as many evenly spaced"
	@echo "make bench-sweep    what measuring a finished run takes, and how near a few of its checkpoints place its transitions"
	@echo "make bench-transitions  transitions found, missed and made up, beside other detectors"
	@echo "make reliability  what is lost when runs are killed, records damaged and readers given odd input"
	@echo "make wheel-test  build the wheel and try it in an environment of its own"

$(BIN)/phasewatch: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/phasewatch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(BIN)/phasewatch
	$(BIN)/phasewatch demo
	@echo "These commands are in $(BIN):  source $(BIN)/activate"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

quick: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

wheel-test: $(VENV)/.dev
	bash tests/install/wheel.sh $(BIN)/python

# the peers have requirements that the tests must not meet (a torchvision built for another torch), so a place of their own
$(PEERS)/.done: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints.txt torch
	$(PEERS)/bin/pip install -q -c constraints.txt -e ".[demo]" -r benchmarks/requirements.txt
	@touch $@

# the cases with exact answers are those of the tests
bench-% reliability: export PYTHONPATH := $(CURDIR)/tests:$(CURDIR)/tests/record:$(CURDIR)/tests/transitions

bench-hessian: $(PEERS)/.done
	$(PEERS)/bin/python benchmarks/hessian.py

bench-llc: $(PEERS)/.done
	$(PEERS)/bin/python benchmarks/llc.py

bench-live: $(PEERS)/.done
	$(PEERS)/bin/python benchmarks/live.py

bench-overhead: $(BIN)/phasewatch
	$(BIN)/python benchmarks/overhead.py

bench-price: $(BIN)/phasewatch
	$(BIN)/python benchmarks/price.py

bench-schedule: $(BIN)/phasewatch
	$(BIN)/python benchmarks/schedule.py

bench-sweep: $(BIN)/phasewatch
	$(BIN)/python benchmarks/sweep.py

bench-transitions: $(PEERS)/.done
	$(PEERS)/bin/python benchmarks/transitions.py

reliability: $(VENV)/.dev
	$(BIN)/python benchmarks/reliability.py

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info
