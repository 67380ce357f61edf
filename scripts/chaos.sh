#!/usr/bin/env bash
# Builds what a chaos run needs and runs it: make chaos SEED=7 REQUESTS=1000. See atlas-chaos --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo=${CARGO:-cargo}
# With the test that is the short form: one feature set, so nothing is built twice beside `make test`.
"$cargo" build --locked --workspace --bins --test chaos

target=$("$cargo" metadata --format-version 1 --no-deps --offline |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
exec "$target/debug/atlas-chaos" ${SEED:+--seed "$SEED"} ${REQUESTS:+--requests "$REQUESTS"} --folder "$target/chaos"
