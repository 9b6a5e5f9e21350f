# make demo      train, measure and save an encoder, a language model and a vision-language model (CPU, about 12 minutes)
# make test      every test: the package, its notebooks, its examples, the rules of the house
# make env       only the environment (.venv), which every target makes when it is missing
# make export    notebooks -> package -> README, cleaned and in step
# make clean     remove .venv and what the targets made
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
BIN := $(ROOT).venv/bin

.PHONY: help demo test env export lint clean

help:
	@sed -n 's/^# make/make/p' $(ROOT)Makefile

env:
	@$(ROOT)tools/environment.sh

demo:
	@DEMO=1 $(ROOT)tools/environment.sh
	@cd $(ROOT) && $(BIN)/python tools/demo.py

test: env
	@cd $(ROOT) && $(BIN)/python tools/test.py

lint: env
	@cd $(ROOT) && $(BIN)/ruff check . && $(BIN)/lint-imports

export: env
	@cd $(ROOT) && $(BIN)/python tools/export.py

clean:
	rm -rf $(ROOT).venv $(ROOT)runs
