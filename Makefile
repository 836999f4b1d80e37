# Two commands do all the set-up: `make demo` and `make test`.
VENV ?= .venv

.PHONY: install demo test
install:
	@scripts/install.sh $(VENV)

demo: install
	@VENEER=$(VENV)/bin/veneer scripts/demo.sh

test:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/ruff check src tests benchmarks recipes
	@$(VENV)/bin/ruff format --check src tests benchmarks recipes
	@$(VENV)/bin/python -m veneer.data.bundled.generate --check
	@$(VENV)/bin/python -m pytest -n $${VENEER_TEST_WORKERS:-2} --dist loadfile -m "not gpu"
