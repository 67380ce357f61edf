#!/usr/bin/env bash
# The Compose stack: up, down, logs, index, publish, ask, cli, config. What the Makefile's atlas-* targets run.
#
# Takes Compose v2 (`docker compose`) or v1 (`docker-compose`), whichever is there. Messages and paths
# come in ATLAS_MSG and ATLAS_DOCS_PATH, so that no quote or dollar sign in them is ever interpreted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

secrets=.atlas/compose/secrets
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-atlas}

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

find_compose() {
    command -v docker >/dev/null || command -v docker-compose >/dev/null || die \
        "Docker is not installed. Install Docker with Compose, then run this again." \
        "Without Docker, 'make demo' shows Atlas, and 'scripts/atlas.sh dev' runs it in one process."
    if docker compose version >/dev/null 2>&1; then
        compose=(docker compose)
    elif command -v docker-compose >/dev/null; then
        compose=(docker-compose)
    else
        die "Docker is here, but Compose is not: install the Compose plugin, or docker-compose 1.29."
    fi
}

need_engine() {
    docker info >/dev/null 2>&1 || die "No Docker engine answers. Start it (or get the right to use it: group docker), then run this again."
}

# The value of a variable: from the environment, or from .env as Compose would read it.
setting() {
    local name=$1
    if [[ -n ${!name:-} ]]; then
        printf '%s' "${!name}"
    elif [[ -f .env ]]; then
        sed -nE "s/^(export )?$name=//p" .env | tail -n 1 | sed -E "s/^(['\"])(.*)\1\$/\2/" | tr -d '\r\n'
    fi
}

# Secrets become files: they show neither in `docker inspect` nor in the file.
prepare_secrets() {
    scripts/dev_secrets.sh "$secrets"
    local name key file
    for name in OPENAI_API_KEY RERANK_API_KEY; do
        key=$(setting "$name")
        file=${name,,}
        printf '%s' "$key" >"$secrets/$file"
        # An empty file would count as a mistake: what has no key gets no file.
        if [[ -n $key ]]; then
            export "ATLAS_${name}_FILE=/run/secrets/$file"
        fi
    done
}

say_which_model() {
    local model url
    model=$(setting OPENAI_MODEL)
    url=$(setting OPENAI_BASE_URL)
    if [[ -n $(setting OPENAI_API_KEY) || -n $url ]]; then
        echo "Model: ${model:-the default one}, at ${url:-the default address}."
    else
        echo "No OPENAI_API_KEY: the offline drafter writes the specs (it is no language model, and says so), and search is lexical."
    fi
}

up() {
    say_which_model
    "${compose[@]}" up --detach --build --remove-orphans --scale "worker=${WORKERS:-1}"
    cat <<TEXT

The stack is up (first start: give it a minute; '${compose[*]} ps' shows health).
  Ask          make atlas-ask MSG="Design a logging system for microservices"
  Index        make atlas-index DOCS_PATH=.
  Gateway      http://127.0.0.1:${GATEWAY_PORT:-8501}
  Grafana      http://127.0.0.1:${GRAFANA_PORT:-3000}  (looking needs no login; admin's password: $secrets/grafana_password)
  Prometheus   http://127.0.0.1:${PROMETHEUS_PORT:-9090}
  Pub/Sub      127.0.0.1:${PUBSUB_PORT:-8085}  (emulator, project ${PUBSUB_PROJECT_ID:-atlas-dev})
  Supabase     http://127.0.0.1:${SUPABASE_PORT:-54321}/rest/v1  (key: $secrets/service_role_key)
TEXT
    say_which_model
}

# The atlas command inside the stack. Runs as you, so that it can read what you can read.
cli() {
    local options=(--rm --no-deps --user "$(id -u):$(id -g)")
    [[ -t 0 && -t 1 ]] || options+=(-T)
    "${compose[@]}" run "${options[@]}" "${cli_mounts[@]}" cli "$@"
}

find_compose
cli_mounts=()
command=${1:-}
shift || true

case $command in
    config)
        prepare_secrets
        "${compose[@]}" config "$@"
        ;;
    up)
        need_engine
        prepare_secrets
        up
        ;;
    down)
        need_engine
        prepare_secrets
        options=(--remove-orphans)
        [[ ${VOLUMES:-0} == 1 ]] && options+=(--volumes)
        "${compose[@]}" down "${options[@]}"
        ;;
    logs)
        need_engine
        prepare_secrets
        "${compose[@]}" logs --follow --tail=200 "$@"
        ;;
    index)
        path=${ATLAS_DOCS_PATH:-}
        [[ -n $path ]] || die "Say what to index: make atlas-index DOCS_PATH=path/to/folder"
        # Make hands a tilde over as it is.
        # shellcheck disable=SC2088
        [[ $path == "~/"* ]] && path=$HOME/${path#"~/"}
        [[ -d $path ]] || die "$path is not a folder."
        need_engine
        prepare_secrets
        # Under its own name: it tells folders apart in the index.
        path=$(realpath -- "$path")
        cli_mounts=(--volume "$path:/index/$(basename -- "$path"):ro")
        cli index "/index/$(basename -- "$path")" "$@"
        ;;
    publish | ask)
        [[ -n ${ATLAS_MSG:-} ]] || die "Say what to design: make atlas-$command MSG=\"Design a logging system\""
        need_engine
        prepare_secrets
        cli "$command" "$@" -- "$ATLAS_MSG"
        ;;
    cli)
        need_engine
        prepare_secrets
        cli "$@"
        ;;
    *)
        die "usage: stack.sh up|down|logs|index|publish|ask|cli|config"
        ;;
esac
