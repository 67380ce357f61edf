#!/usr/bin/env bash
# Runs the atlas command: ATLAS_BIN, or the one on the PATH, or this repository's, built if need be.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -n ${ATLAS_BIN:-} ]]; then
    exec "$ATLAS_BIN" "$@"
elif command -v atlas >/dev/null; then
    exec atlas "$@"
fi
CARGO_TERM_QUIET=true exec "$root/scripts/built.sh" "$@"
