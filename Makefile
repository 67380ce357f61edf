# `make help` lists everything. Logic lives in the atlas command and in scripts/; this file only names it.
#
# Values with spaces or quotes are safe: MSG and DOCS_PATH are read raw and handed over in the
# environment, never pasted into a shell command.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

CARGO ?= cargo

# Make would otherwise expand a `$` in them when it exports them itself.
unexport MSG DOCS_PATH
export ATLAS_MSG := $(value MSG)
export ATLAS_DOCS_PATH := $(value DOCS_PATH)

##@ Try it

.PHONY: demo
demo: ## Index this repository, ask two questions, print the specs and what they cost (no key needed)
	@scripts/built.sh demo

##@ Work on it

.PHONY: test
test: ## Run every test; what a missing service skips is listed at the end
	@scripts/test.sh

.PHONY: e2e
e2e: ## 200 requests and live text through separate processes: emulator, Postgres, simulator, gateway, workers
	@scripts/test.sh --test e2e --test operators --test live -- --nocapture

.PHONY: mutations
mutations: ## Break the code on purpose, one mutation at a time: which test notices? (not in CI)
	@scripts/mutate.sh

.PHONY: chaos
chaos: ## Break the fleet on purpose and reconcile the books: make chaos SEED=7 REQUESTS=10000
	@scripts/chaos.sh

.PHONY: lint
lint: ## Clippy, as strict as CI
	@$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

.PHONY: fmt
fmt: ## Format the code
	@$(CARGO) fmt --all

.PHONY: deny
deny: ## Licences, sources and known vulnerabilities of the dependencies (needs cargo-deny)
	@$(CARGO) deny --locked check

.PHONY: check-deploy
check-deploy: ## Scripts, Compose, Prometheus, Alertmanager, Grafana and Kubernetes files (with the tools at hand)
	@scripts/check_deploy.sh

.PHONY: ci
ci: ## What CI runs; installs the tools it lacks
	@bash .ci/run

.PHONY: bench
bench: ## Measure throughput, overhead, memory and search on release builds (about half an hour with the build)
	@scripts/bench.sh

##@ The real services, in containers

.PHONY: atlas-dev
atlas-dev: ## Start the whole stack with Docker Compose (WORKERS=3 for three workers)
	@scripts/stack.sh up

.PHONY: atlas-down
atlas-down: ## Stop the stack; data stays (VOLUMES=1 removes it too)
	@scripts/stack.sh down

.PHONY: atlas-logs
atlas-logs: ## Follow the logs of the stack
	@scripts/stack.sh logs

.PHONY: atlas-index
atlas-index: ## Index a folder into the stack: make atlas-index DOCS_PATH=~/src/project
	@scripts/stack.sh index

.PHONY: atlas-publish
atlas-publish: ## Publish a request and return: make atlas-publish MSG="Design a logging system"
	@scripts/stack.sh publish

.PHONY: atlas-ask
atlas-ask: ## Publish a request and wait for its spec: make atlas-ask MSG="Design a logging system"
	@scripts/stack.sh ask

##@ Help

.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
