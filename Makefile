PYTHON ?= python
TYPES = build/types

.PHONY: check format lint types test slow

check: lint types test slow

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

# mypy does not follow texforce.__path__, so it checks the wheel's layout; sed turns its paths back into the checkout's.
types: SHELL = /bin/bash -o pipefail
types:
	rm -rf $(TYPES)
	$(PYTHON) -m hatchling build -t wheel -d $(TYPES)
	$(PYTHON) -m zipfile -e $(TYPES)/*.whl $(TYPES)
	cd $(TYPES) && $(PYTHON) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p texforce \
		| sed -e 's|^texforce/__init__\.py|texforce.py|' -e 's|^texforce/||'

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow
