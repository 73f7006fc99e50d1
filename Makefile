PYTHON ?= python3
CONSTRAINTS ?=
RUN = .venv/bin/python
TEST = $(RUN) -m pytest -q -n auto --maxprocesses 4

.PHONY: install demo test test-all test-gpu faults soak bench lint

install: .venv/installed

.venv/installed: requirements.txt tools/torchrun.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.15 is needed, this is %d.%d: make install PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r requirements.txt
	{ head -n 1 .venv/bin/torchrun; cat tools/torchrun.py; } > .venv/torchrun  # the script's options are its own
	chmod +x .venv/torchrun
	mv .venv/torchrun .venv/bin/torchrun
	touch $@

# With another policy one busy program beside it makes each thread wait for the others at every operator
demo: export OMP_WAIT_POLICY ?= passive
demo: install  ## NPID on the built-in data set: train, evaluate, draw
	$(RUN) npid.py --preset demo --output runs/demo
	$(RUN) figures.py curves runs/demo --out runs/demo/curves.png
	$(RUN) figures.py gallery runs/demo --subset 5000 --test-subset 1000 --out runs/demo/gallery.png
	$(RUN) eval_knn.py runs/demo/checkpoint.pth --subset 5000 --k 200 20 --retrieval

test: install  ## some ten minutes on 2 CPU cores
	$(TEST) -m "not slow and not gpu"

test-all: install  ## also the long ones; with CIFAR-10 if $$DATA_DIR has it
	$(RUN) -m pytest -q tests/test_slurm.py  # alone: a machine has room for one cluster
	$(TEST) -m "not gpu" --ignore tests/test_slurm.py

test-gpu: install  ## what needs a CUDA device
	$(RUN) -m pytest -q -m gpu

MINUTES ?= 20
faults: install  ## attacks on every script, at random, for MINUTES; the counts go to tests/README.md
	PYTHONPATH=.:tests $(RUN) tests/faults/campaign.py --add --minutes $(MINUTES) --seed $$(date +%s)

soak: install  ## NPID, then Local Aggregation, for MINUTES: memory, files and log have to stay flat
	PYTHONPATH=.:tests $(RUN) tests/faults/soak.py --minutes $(MINUTES)

bench: install  ## ratios against the plain way of doing the same, to results/bench.jsonl
	$(RUN) benchmarks/bench.py

lint: install
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt ruff mypy
	.venv/bin/ruff check .
	.venv/bin/mypy
