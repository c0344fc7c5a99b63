# make report | locality | test | figures | tune | world | bench | explore | clean      (README.md says what each needs and writes)

PYTHON      ?= python3
PROFILE     ?= quick
JOBS        ?= 2
# Given on the command line: DATA=unkebench UKE_DATA=/folder (or DATA_FILE=/file.json), LIMIT=20, METHODS=FT-L,FT-M, MODEL=directory-or-hub-name,
# DOCUMENTS=/dump.xml.bz2,/more.jsonl and STRUCTURED=/triples.json for the locality set (UKE_DATA has them in wikipedia/ and structured/)
DATA        ?=
DATA_FILE   ?=
LIMIT       ?=
METHODS     ?=
MODEL       ?=
# The seed of another world, of `make world`
SEED        ?= 2
DOCUMENTS   ?=
STRUCTURED  ?=
# Of `make bench`: full (15 to 45 minutes) or smoke; rows of the processor (cpu), of a CUDA device (gpu), or all that can be measured here
SIZE        ?= full
ROWS        ?= all
# One more wheel index for pip, for example one that has the CPU build of torch
EXTRA_INDEX ?=

VENV     := .venv
STAMP    := $(VENV)/.installed
CORES    := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS  := $(shell n=$$(( $(CORES) / $(JOBS) )); echo $$(( n > 0 ? n : 1 )))
given     = $(if $($(1)),$(2)='$($(1))')
GIVEN     = $(call given,DATA_FILE,$(1)data_file) $(call given,LIMIT,$(1)limit) $(call given,METHODS,$(1)methods) $(call given,MODEL,$(1)model) \
            $(call given,DOCUMENTS,$(1)documents) $(call given,STRUCTURED,$(1)structured)
CONFIG    = profile='$(PROFILE)' $(call given,DATA,data) threads=$(THREADS) $(call GIVEN)
CHECK     = $(VENV)/bin/python -m uke.cli.run --check --profile '$(PROFILE)' $(call given,DATA,--data) $(call GIVEN,--shared )
SNAKEMAKE = $(VENV)/bin/snakemake --cores $$(( $(JOBS) * $(THREADS) )) --quiet host reason rules --rerun-incomplete --nolock

ifdef UKE_DATA
export UKE_DATA
endif

# A misspelt variable would be ignored in silence, so it is refused.
KNOWN := PYTHON PROFILE JOBS DATA DATA_FILE LIMIT METHODS MODEL SEED SIZE ROWS DOCUMENTS STRUCTURED EXTRA_INDEX UKE_DATA UKE_HOME
$(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(if $(filter $(name),$(KNOWN)),,$(error $(name): unknown variable; expected one of $(KNOWN)))))

.PHONY: report locality test figures tune world bench explore clean
.DEFAULT_GOAL := report

report: $(STAMP)
	@$(CHECK)
	$(SNAKEMAKE) report --config $(CONFIG)

# The locality set of the world (results/world-*/<split>/locality/), or of DATA (results/<profile>-<data>/locality/).
locality: $(STAMP)
	@$(CHECK)
	$(SNAKEMAKE) locality --config $(CONFIG)

# Every figure and table drawn again, and the report composed, from what figures/<profile>/ has stored: no model, no notebook.
figures: PROFILE = embedded
figures: $(STAMP)
	$(VENV)/bin/python -m uke.cli.run --compose --profile '$(PROFILE)' $(call given,DATA,--data)

# Both searches at once: the settings of each method, and the learning rate of each level of a factor.
tune: PROFILE = embedded
tune: $(STAMP)
	@$(CHECK)
	$(SNAKEMAKE) tune --config $(CONFIG)

# The headline rows on another world: its model (two hours on two cores, resumed; minutes on a GPU), then figures/embedded-world-SEED/.
HEADLINE := 00_embedded_model 03_factor_loss_scope 04_factor_layers 05_factor_components 06_factor_chat_template 07_recipe 08_batch_size
world: PROFILE = embedded-world-$(SEED)
world: $(STAMP)
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/python -m uke.cli.run 00_embedded_model --profile '$(PROFILE)' --set retrain=true
	@$(CHECK)
	$(SNAKEMAKE) $(foreach name,$(HEADLINE),'$(CURDIR)/results/$(PROFILE)/sections/$(name).json') --config $(CONFIG)
	$(VENV)/bin/python -m uke.cli.run --compose --profile '$(PROFILE)'

# The published loop, one edit after another, and lanes, timed in turns on an idle machine: benchmarks/results/, which 10_cost shows.
bench: $(STAMP)
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=$(CORES) $(VENV)/bin/python benchmarks/bench.py --size '$(SIZE)' --rows '$(ROWS)'

test: $(STAMP)
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(VENV)/bin/python -m pytest

explore: $(STAMP)
	$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(or $(wildcard notebooks/explore.ipynb),notebooks)

clean:
	rm -rf results .snakemake .pytest_cache
	find figures -mindepth 1 -maxdepth 1 ! -name 'embedded*' ! -name benchmarks ! -name explore.png -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=")'
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(if $(EXTRA_INDEX),--extra-index-url '$(EXTRA_INDEX)') -e '.[similarity,test]' -c constraints.txt
	touch $@
