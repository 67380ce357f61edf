#!/usr/bin/env bash
# Runs the workspace's tests and lists what was skipped, and why. Arguments go to `cargo test`.
#
# Binaries and tests are built in one step first: tests of one package start the binaries of
# others, and one feature set means nothing is built twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo=${CARGO:-cargo}
ATLAS_SKIP_LOG=$(mktemp)
export ATLAS_SKIP_LOG
trap 'rm -f "$ATLAS_SKIP_LOG"' EXIT

"$cargo" build --locked --workspace --bins --tests

status=0
"$cargo" test --locked --workspace --no-fail-fast "$@" || status=$?

if [[ -s $ATLAS_SKIP_LOG ]]; then
    echo
    echo "Not run here ($(sort -u "$ATLAS_SKIP_LOG" | wc -l) named skips):"
    sort -u "$ATLAS_SKIP_LOG" | sed 's/^/  /'
fi
exit "$status"
