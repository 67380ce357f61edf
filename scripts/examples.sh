#!/usr/bin/env bash
# Writes docs/examples anew: indexes this repository's documents and asks three questions, with the
# simulator as the model API. Needs the built binaries: cargo build --workspace --bins
#
#   scripts/examples.sh [FOLDER]        FOLDER: where to write, docs/examples by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=${ATLAS_BIN_DIR:-${CARGO_TARGET_DIR:-target}/debug}
out=${1:-docs/examples}
work=$(mktemp -d)
sim=
finish() {
    [[ -n $sim ]] && kill "$sim" 2>/dev/null
    rm -rf "$work"
}
trap finish EXIT

"$bin/openai-sim" --port 0 >"$work/sim.log" &
sim=$!
url=
for _ in $(seq 100); do
    url=$(grep -o 'http://[^ ]*/v1' "$work/sim.log" | head -n 1 || true)
    [[ -n $url ]] && break
    sleep 0.1
done
[[ -n $url ]] || { echo "the simulator did not start" >&2; exit 1; }

# Nothing of the caller's settings: the same command gives the same documents everywhere.
atlas() {
    env -i PATH="$PATH" HOME="$work" TMPDIR="${TMPDIR:-/tmp}" NO_COLOR=1 ATLAS_DATA_DIR="$work/data" \
        OPENAI_BASE_URL="$url" OPENAI_API_KEY=sk-simulated OPENAI_EMBEDDING_MODEL=none \
        SOURCE_URL_TEMPLATE='https://git.example.com/team/atlas/blob/{commit}/{path}#L{start}-L{end}' \
        "$bin/atlas" "$@"
}

# The documents; not the examples themselves.
atlas index . --repo atlas --include 'docs/*.md' --include 'migrations/README.md' --include 'README.md' \
    --exclude 'docs/CONFIGURATION.md' --exclude 'docs/examples/**' --exclude 'docs/runbooks/**' --quiet
atlas ask "Design token budgets for tenants, so that no tenant can use up the day of the others." \
    --live never --out "$out/tenant-budgets.md"
atlas ask "Write an ADR on where the lease of a run is kept, and whose clock ends it." \
    --live never --out "$out/adr-leases.md"
atlas ask "Review how a finished answer gets from the store to the topic, and what a crash can do to it." \
    --live never --out "$out/review-outbox.md"
