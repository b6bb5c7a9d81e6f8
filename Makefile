# The project's ritual: `make demo` runs the whole road, `make check` and `make test` come before every commit.

PYTHON ?= python3.11
READY := .venv/.ready
DEMO := runs/demo
# Tiles that training never sees: one of H&E tissue, one of immunohistochemistry.
HE_TILE := test_data/imgs/cmu_x1120_y1960_160.jpg
IHC_TILE := test_data/imgs/ihc_x0264_y0352_160.jpg

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-next bench bench-gpu check format release clean

# Rebuilt only when what it installs changes.
$(READY): pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

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

test: $(READY)
	python -m pytest -m "not slow"

test-slow: $(READY)
	python -m pip install --quiet --constraint constraints.txt --editable '.[dev,slow]'
	python -m pytest -m slow

# The same suite on a newer torch and transformers: Composer's own pins are passed over, see docs/versions.md.
NEXT := .venv-next
$(NEXT)/.ready: pyproject.toml constraints.txt constraints-next.txt
	test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --requirement constraints-next.txt
	grep -vE "^(#|($$(sed -n 's/==.*//p' constraints-next.txt | paste -sd '|'))==)" constraints.txt > $(NEXT)/rest.txt
	$(NEXT)/bin/python -m pip install --quiet --no-deps --requirement $(NEXT)/rest.txt
	$(NEXT)/bin/python -m pip install --quiet --no-deps --editable .
	touch $(NEXT)/.ready

test-next: $(NEXT)/.ready
	PATH="$(CURDIR)/$(NEXT)/bin:$$PATH" python -m pytest -m "not slow"

# About an hour on two cores; results go to benchmarks/results.
bench: $(READY)
	python -m benchmarks.step_speed
	python -m benchmarks.end_to_end
	python -m benchmarks.scaling
	python -m benchmarks.learning
	python -m benchmarks.loss_chunk
	python -m benchmarks.convert_speed
	python -m benchmarks.loader_speed
	PYTHONPATH=tests python -m benchmarks.first_batch
	python -m benchmarks.convert_memory

# One GPU that holds a 7B's training (141 GB); `make bench-gpu GPU_FLAGS=--tiny` goes through every line on a CPU.
bench-gpu: $(READY)
	python -m benchmarks.train_gpu $(GPU_FLAGS)

check: $(READY)
	ruff check .
	ruff format --check .
	mypy
	yamllint --strict .

format: $(READY)
	ruff check --fix .
	ruff format .

# An sdist, and from it a wheel that is tried in an environment of its own: --version and init take no other package.
RELEASE := .venv-release
release:
	rm -rf build dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --constraint constraints.txt build
	$(RELEASE)/bin/python -m build --outdir dist
	$(RELEASE)/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd $(RELEASE) && bin/python -c 'import composer_path as c; assert "$(RELEASE)" in c.__file__, c.__file__'
	cd $(RELEASE) && bin/composer-path --version && bin/composer-path init --demo start
	diff -r yamls $(RELEASE)/start/yamls
	for part in $$(ls $(RELEASE)/start/test_data); do diff -r test_data/$$part $(RELEASE)/start/test_data/$$part || exit 1; done

clean:
	rm -rf runs $(NEXT) $(RELEASE) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
