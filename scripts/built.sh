#!/usr/bin/env bash
# Builds this repository's atlas command and runs it, with the folder and arguments of the caller.
set -euo pipefail
manifest=$(dirname "${BASH_SOURCE[0]}")/../Cargo.toml

cargo=${CARGO:-cargo}
# The features that `make test` builds with, or everything that takes minutes would be compiled once for each:
# those of the whole workspace, and of what its tests depend on. Cargo counts the latter where a test or an
# example is asked for, and there are no examples.
"$cargo" build --locked --manifest-path "$manifest" --workspace --bin atlas --examples

target=$("$cargo" metadata --format-version 1 --no-deps --offline --manifest-path "$manifest" |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
exec "$target/debug/atlas" "$@"
