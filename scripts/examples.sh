#!/usr/bin/env bash
# Writes docs/examples anew: indexes documents and code of this repository as last committed, and asks three
# questions of the golden set. The model API is the simulator, which gives the answers in
# worker/tests/golden/answers. Needs the built binaries: cargo build --workspace --bins --tests
#
#   scripts/examples.sh [FOLDER]        FOLDER: where to write, docs/examples by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=$(realpath "${ATLAS_BIN_DIR:-${CARGO_TARGET_DIR:-target}/debug}")
out=$(realpath "${1:-docs/examples}")
answers=$PWD/worker/tests/golden/answers
work=$(mktemp -d)
sim=
finish() {
    [[ -n $sim ]] && kill "$sim" 2>/dev/null
    git worktree remove --force "$work/atlas" 2>/dev/null
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
        OPENAI_BASE_URL="$url" OPENAI_API_KEY=sk-simulated OPENAI_EMBEDDING_MODEL=none TOKEN_BUDGET_PER_RUN=24000 \
        SOURCE_URL_TEMPLATE='https://git.example.com/team/atlas/blob/{commit}/{path}#L{start}-L{end}' \
        "$bin/atlas" "$@"
}

# What somebody reads to decide: not the tests, not the examples themselves, nothing that is not committed.
git worktree add --quiet --detach "$work/atlas"
atlas index "$work/atlas" --repo atlas --include README.md --include 'docs/*.md' --include 'migrations/*' \
    --include 'worker/src/*.rs' --include 'shared/src/**/*.rs' --exclude docs/CONFIGURATION.md \
    --exclude docs/JUDGE.md --exclude docs/MODELS.md --exclude 'docs/examples/**' --exclude 'docs/runbooks/**' \
    --exclude '**/tests.rs' --quiet

# FILE, then the request, as in the golden set.
example() {
    curl --silent --show-error --fail --request PUT --data-binary "@$answers/$1.json" "${url%/v1}/sim/script"
    atlas ask "$2" --live never --out "$out/$1.md"
}
example tenant-budgets "Design token budgets for tenants, so that no tenant can use up the day of the others"
example adr-leases "Write an ADR on where the lease of a run is kept"
example review-outbox "Review how answers get from the outbox to the topic"
