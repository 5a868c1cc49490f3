# make thesis   from a fresh clone to thesis_figures/demo (environment included); the same command goes on
# make plan     what `make thesis` would run now
# make test     everything that CI checks
# Photographs of one's own: make thesis DATA=path/to/photographs [PROFILE=compact] [STUDY=name] [SEED=0] [CORES=2]
# A study is a file of studies/: make thesis PROFILE=gpu DATA=...
PYTHON  ?= python3
VENV    ?= .venv
DATA    ?=
STUDY   ?=
SEED    ?= 0
CORES   ?= 2
GPU     := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
PROFILE ?= $(if $(DATA),$(if $(filter 0,$(GPU)),compact,thesis),demo)
BIN     := $(abspath $(VENV))/bin
PLACE   := $(if $(DATA),$(shell $(PYTHON) -c "import os, sys; print(os.path.abspath(sys.argv[1]))" "$(DATA)"))
GIVEN   := seed=$(SEED) gpu=$(if $(filter 0,$(GPU)),0,1) $(if $(STUDY),study='"$(STUDY)"') $(if $(DATA),data_dir='"$(PLACE)"')
STEPS   := env PATH="$(BIN):$$PATH" $(BIN)/snakemake --configfile studies/$(PROFILE).yaml --config $(GIVEN) \
  --cores $(CORES) --resources gpu=1 --keep-going --rerun-incomplete --nolock
OPENED   = open_study('$(PROFILE)' if '$(PROFILE)' != 'gpu' else 'thesis', '$(DATA)' or None, '$(STUDY)' or None)

.PHONY: thesis memoria plan test lint format env pages export clean check-figures

# One such command at a time: flock, not snakemake's own lock, which outlives a process that is killed.
thesis: env
	@mkdir -p runs; flock --nonblock --close --conflict-exit-code 75 runs/.workflow.lock \
	  $(STEPS) --quiet host reason; code=$$?; \
	  [ $$code -ne 75 ] || echo "another make thesis is at work here: wait for it or end it"; exit $$code

plan: env
	@$(STEPS) --dry-run --quiet host reason

# Chapters 4 to 6 of the thesis, from a study's files: make memoria [STUDY=industrial6_compact] [LANGUAGE=es|en]
LANGUAGE ?= es
memoria: env
	@$(BIN)/python -c "from deimv2_tfg.memoria import make_memoria; \
	  print(make_memoria('thesis_figures/$(or $(STUDY),industrial6_compact)', '$(LANGUAGE)'))"

# The notebooks are stored with the outputs of the demo: after `make thesis`, this copies them into nbs/.
pages: env
	$(BIN)/python tools/pages.py runs/demo/pages
	$(BIN)/python -c "from deimv2_tfg.freshness import write_index; write_index('thesis_figures/package')"
	$(BIN)/nbdev_clean

# Every page runs once, in tests/test_chapters.py, by the workflow and from another folder; nbdev_test
# adds only its own way to start a page, so one page shows it. One thread per process.
test: lint
	export OMP_NUM_THREADS=1; (cd nbs && $(BIN)/nbdev_test --path 00_core.ipynb) & page=$$!; \
	  $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests; \
	  tests=$$?; wait $$page && exit $$tests

# Lines as ruff writes them: notebooks, package, tests (rules in ruff.toml).
lint: env
	$(BIN)/ruff format --check nbs tests tools studies deimv2_tfg
	$(BIN)/ruff check nbs tests tools studies deimv2_tfg

format: env
	$(BIN)/ruff check --fix-only --select I nbs tests tools studies
	$(BIN)/ruff format nbs tests tools studies

# The package from its notebooks, formatted as they are.
export: env
	$(BIN)/nbdev_export
	$(BIN)/ruff check --fix-only --quiet --select I deimv2_tfg
	$(BIN)/python -c "from deimv2_tfg.cli import narrow_exports; narrow_exports('deimv2_tfg')"
	$(BIN)/ruff format --quiet deimv2_tfg

# Without bytecode of 21,000 files, of which few are ever imported: a quarter less time.
env: $(VENV)/.installed

$(VENV)/.installed: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[dev,text]"
	touch $@

clean:
	rm -rf runs/smoke runs/data thesis_figures/smoke

# Figures whose code, runs or data have changed, of every study in thesis_figures/: make check-figures
check-figures: env
	$(BIN)/python -c "from deimv2_tfg.freshness import report_figures; raise SystemExit(report_figures() > 0)"
