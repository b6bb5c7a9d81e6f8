# The project's ritual: `make demo` runs the whole road, `make check` and `make test` come before every commit.

PYTHON ?= python3.11
READY := .venv/.ready
DEMO := runs/demo
# Tiles that training never sees: one of H&E tissue, one of immunohistochemistry.
HE_TILE := test_data/imgs/cmu_x1120_y1960_160.jpg
IHC_TILE := test_data/imgs/ihc_x0264_y0352_160.jpg

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-pinned test-pinned-parity bench bench-gpu soak check advisories format release clean

# Two stacks, installed from full lists of names and versions without a resolver: docs/versions.md says why. A list that
# changes is installed again.
INSTALL = -m pip install --quiet --no-deps --editable .
NEWEST := requirements/common.txt requirements/newest.txt
$(READY): pyproject.toml $(NEWEST)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) $(NEWEST:%=--requirement %)
	touch $(READY)

PINNED := requirements/common.txt requirements/pinned.txt
.venv-pinned/.ready: pyproject.toml $(PINNED)
	test -x .venv-pinned/bin/python || $(PYTHON) -m venv .venv-pinned
	.venv-pinned/bin/python $(INSTALL) $(PINNED:%=--requirement %)
	touch .venv-pinned/.ready

# Every line is a command you could type (with .venv/bin on your PATH).
demo: $(READY)
	rm -rf $(DEMO)
	composer-path convert --data test_data/captions.json --images test_data/imgs --out $(DEMO)/shards/captions
	composer-path convert --data test_data/data.json --images test_data/imgs --out $(DEMO)/shards/train
	composer-path convert --data test_data/heldout_captions.json --images test_data/imgs --out $(DEMO)/shards/heldout_captions
	composer-path convert --data test_data/heldout.json --images test_data/imgs --out $(DEMO)/shards/heldout
	composer train.py yamls/demo/pretrain.yaml
	composer train.py yamls/demo/finetune.yaml
	composer-path export $(DEMO)/finetune $(DEMO)/exported
	composer-path ask $(DEMO)/exported --image $(HE_TILE) "Is this tile mostly tissue or mostly background?"
	composer-path ask $(DEMO)/exported --image $(HE_TILE) "Which stain was used here, H&E or IHC?"
	composer-path ask $(DEMO)/exported --image $(IHC_TILE) "Which stain was used here, H&E or IHC?"
	composer-path evaluate $(DEMO)/exported --data test_data/heldout.json --images test_data/imgs > /dev/null
	composer-path summary $(DEMO)

# Files go to as many processes as there are cores, four at most: each holds 3 GB.
PYTEST := python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile
test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	.venv/bin/python $(INSTALL) --requirement requirements/slow.txt
	python -m pytest -m slow --timeout=3600

test-pinned: .venv-pinned/.ready
	PATH="$(CURDIR)/.venv-pinned/bin:$$PATH" $(PYTEST) -m "not slow"

# Of the pinned stack what CI looks at: parity with the reference, the road, and what is asked of Composer and Streaming.
PARITY := tests/test_requirements.py tests/test_architecture.py tests/models tests/weights tests/records \
	tests/run/test_sharding.py tests/run/test_trainer.py tests/seam \
	tests/checkpoints/test_trained_only.py tests/checkpoints/test_checkpoint_reading.py tests/checkpoints/test_guarded_reader.py \
	tests/stream/test_streaming_originals.py tests/batches/test_memory_ring.py
test-pinned-parity: .venv-pinned/.ready
	PATH="$(CURDIR)/.venv-pinned/bin:$$PATH" $(PYTEST) -m "not slow" $(PARITY)

# About an hour on two cores; results go to benchmarks/results.
bench: $(READY)
	python -m benchmarks.step_speed
	python -m benchmarks.end_to_end
	python -m benchmarks.host_work
	python -m benchmarks.scaling
	python -m benchmarks.learning
	python -m benchmarks.loss_chunk
	python -m benchmarks.convert_speed
	python -m benchmarks.loader_speed
	PYTHONPATH=tests python -m benchmarks.first_batch
	python -m benchmarks.convert_memory

# One GPU that holds a 7B's training (141 GB); GPU_FLAGS=--tiny runs every line on a CPU.
bench-gpu: $(READY)
	benchmarks/gpu.sh $(GPU_FLAGS)

# Kills, damage, a full disk, other numbers of ranks: about an hour on two cores; results go to benchmarks/results/soak.json.
soak: $(READY)
	PYTHONPATH=tests python -m benchmarks.soak

check: $(READY)
	ruff check .
	ruff format --check .
	mypy
	yamllint --strict .

# Published advisories that name a version of the two stacks; pip-audit is asked where it is installed and has a network.
advisories: $(READY)
	python tests/advisories.py

format: $(READY)
	ruff check --fix .
	ruff format .

# An sdist, and from it a wheel that is tried in an environment of its own: --version and init take no other package.
RELEASE := .venv-release
release:
	rm -rf build dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --constraint requirements/common.txt --constraint requirements/slow.txt build
	$(RELEASE)/bin/python -m build --outdir dist
	$(RELEASE)/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd $(RELEASE) && bin/python -c 'import composer_path as c; assert "$(RELEASE)" in c.__file__, c.__file__'
	cd $(RELEASE) && bin/composer-path --version && bin/composer-path init --demo start
	diff -r yamls $(RELEASE)/start/yamls
	for part in $$(ls $(RELEASE)/start/test_data); do diff -r test_data/$$part $(RELEASE)/start/test_data/$$part || exit 1; done

clean:
	rm -rf runs $(RELEASE) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
