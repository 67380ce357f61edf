#!/usr/bin/env bash
# Publishes a request: scripts/publish_task.sh "Design a logging system" [options of `atlas publish`].
set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: publish_task.sh MESSAGE [options]" >&2 && exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/atlas.sh" publish "$@"
