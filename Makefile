# make thesis   from a fresh clone to thesis_figures/demo (environment included)
# make test     everything that CI checks
# Photographs of one's own: make thesis DATA=path/to/photographs [PROFILE=compact] [STUDY=name] [SEED=0]
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= $(if $(DATA),,demo)
STUDY   ?=
SEED    ?= 0
DATA    ?=
BIN     := $(VENV)/bin
PARAMS  := $(if $(PROFILE),-p profile $(PROFILE)) $(if $(DATA),-p data_dir "$(abspath $(DATA))") $(if $(STUDY),-p study $(STUDY)) -p seed $(SEED)
NAME     = $(shell $(BIN)/python -c "from deimv2_tfg.core import open_study; print(open_study('$(PROFILE)' or None, '$(DATA)' or None, '$(STUDY)' or None).name)")
CHAPTERS := $(basename $(notdir $(sort $(wildcard nbs/*.ipynb))))

.PHONY: thesis test lint format env pages export clean check-figures

thesis: env
	@set -e; pages="runs/$(NAME)/pages"; mkdir -p "$$pages"; start=$$(date +%s); \
	for chapter in $(CHAPTERS); do \
	  began=$$(date +%s); \
	  $(BIN)/papermill --no-progress-bar --log-level WARNING -k python3 "nbs/$$chapter.ipynb" "$$pages/$$chapter.ipynb" $(PARAMS); \
	  echo "$$chapter: $$(( $$(date +%s) - began )) s"; \
	done; \
	echo "all chapters: $$(( $$(date +%s) - start )) s; executed notebooks in $$pages, figures and tables in thesis_figures/$(NAME)"

# The notebooks are stored with the outputs of the demo: after `make thesis`, this copies them into nbs/.
pages: env
	$(BIN)/deimv2-tfg pages runs/$(NAME)/pages

# One thread a process and two processes: torch's threads would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# Lines as ruff writes them: notebooks, package, tests (rules in ruff.toml).
lint: env
	$(BIN)/ruff format --check nbs tests deimv2_tfg
	$(BIN)/ruff check nbs tests deimv2_tfg

format: env
	$(BIN)/ruff check --fix-only --select I nbs tests
	$(BIN)/ruff format nbs tests

# The package from its notebooks, formatted as they are.
export: env
	$(BIN)/nbdev_export
	$(BIN)/ruff check --fix-only --quiet --select I deimv2_tfg
	$(BIN)/ruff format --quiet deimv2_tfg

env: $(VENV)/.installed

$(VENV)/.installed: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,text]"
	touch $@

clean:
	rm -rf runs/smoke runs/data thesis_figures/smoke

# Figures whose run, data or code is not what it was: make check-figures [DATA=... PROFILE=... STUDY=...]
check-figures: env
	$(BIN)/python -c "import sys; from deimv2_tfg.core import open_study; from deimv2_tfg.thesis import stale_figures; \
	  stale = stale_figures(open_study('$(PROFILE)' or None, '$(DATA)' or None, '$(STUDY)' or None)); print(stale.to_string() if len(stale) else 'none'); sys.exit(len(stale) > 0)"
