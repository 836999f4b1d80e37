# Two commands do all the set-up: `make demo` and `make test`.
VENV ?= .venv

.PHONY: install demo test test-llama-cpp guide docs
install:
	@scripts/install.sh $(VENV)

demo: install
	@VENEER=$(VENV)/bin/veneer scripts/demo.sh

test:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/ruff check src tests benchmarks recipes scripts
	@$(VENV)/bin/ruff format --check src tests benchmarks recipes scripts
	@$(VENV)/bin/python -m veneer.data.bundled.generate --check
	@$(VENV)/bin/python -m pytest -n $${VENEER_TEST_WORKERS:-2} --dist loadfile -m "not gpu and not llama_cpp"

# Run the lessons as their pages show them, and compare what they print (about an hour on two cores).
guide:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/python scripts/guide.py check docs/hardware.md docs/guide/*.md

# The documentation as a site, in site/.
docs:
	@scripts/install.sh $(VENV) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# llama.cpp itself runs what Veneer exports: builds llama-cpp-python (C++, about 10 minutes) into a folder of its own.
LLAMA_CPP ?= .llama-cpp
test-llama-cpp: $(LLAMA_CPP)/llama_cpp
	@scripts/install.sh $(VENV) test
	@PYTHONPATH=$(LLAMA_CPP) $(VENV)/bin/python -m pytest -m llama_cpp tests/engine

$(LLAMA_CPP)/llama_cpp:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/python -m pip install --no-deps --target $(LLAMA_CPP) llama-cpp-python diskcache
