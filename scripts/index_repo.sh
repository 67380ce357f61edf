#!/usr/bin/env bash
# Indexes a folder: scripts/index_repo.sh PATH [options of `atlas index`].
# Can be interrupted and run again: only what changed is touched.
set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: index_repo.sh PATH [options]" >&2 && exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/atlas.sh" index "$@"
