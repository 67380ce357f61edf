#!/usr/bin/env bash
# Every metric that a dashboard or an alert names must be one that the code exports, and every alert
# must have its runbook: a typo there shows nothing, on the day it is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shopt -s nullglob
status=0

# Histograms are exported as three series.
used=$(grep -ohE '\b(atlas|rag|pubsub)_[a-z0-9_]+' dashboards/*.json deploy/prometheus/*.yml |
    sed -E 's/_(bucket|sum|count)$//' | sort -u)
exported=$(grep -ohrE '"(atlas|rag|pubsub)_[a-z0-9_]+"' --include='*.rs' worker/src rag-gateway/src shared/src |
    tr -d '"' | sort -u)

while read -r metric; do
    if ! grep -qxF -- "$metric" <<<"$exported"; then
        echo "No code exports $metric, which these name: $(grep -lE "\b$metric" dashboards/*.json deploy/prometheus/*.yml | paste -sd' ')"
        status=1
    fi
done <<<"$used"

while read -r alert; do
    if [[ ! -s docs/runbooks/$alert.md ]]; then
        echo "Alert $alert has no runbook docs/runbooks/$alert.md"
        status=1
    fi
    if ! grep -q "alertname: $alert\b" deploy/prometheus/tests/*.yml; then
        echo "Alert $alert has no test in deploy/prometheus/tests"
        status=1
    fi
done < <(sed -nE 's/^ *- alert: *//p' deploy/prometheus/*.yml)

[[ $status -eq 0 ]] && echo "All $(wc -l <<<"$used") metrics in dashboards and alerts are exported; every alert has a runbook and a test."
exit "$status"
