#!/usr/bin/env bash
# Builds everything in release mode and runs all benchmarks, or the one that is named:
#   scripts/bench.sh                                   all of them, as docs/BENCHMARKS.md has them
#   scripts/bench.sh worker --in-flight 1000 --runs 10000 --latency-ms 2000
# Prints Markdown. Nothing else should run on the machine meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo=${CARGO:-cargo}
"$cargo" build --locked --release --workspace --bins
bench=${CARGO_TARGET_DIR:-target}/release/atlas-bench

if (($#)); then
    exec "$bench" "$@"
fi

"$bench" worker --runs 2000 --in-flight 64
"$bench" worker --runs 10000 --in-flight 1000 --latency-ms 2000
# 5,000 files of the sources that cargo has fetched, and the same in Python, where it has the packages.
registry=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/)
python=()
if [[ -n ${BENCH_PYTHON:-} ]]; then
    python=(--python "$BENCH_PYTHON")
else
    venv=${CARGO_TARGET_DIR:-target}/bench-python
    if [[ -x $venv/bin/pip ]] || python3 -m venv "$venv"; then
        if "$venv/bin/pip" install --quiet --disable-pip-version-check -r bench/index_baseline.txt; then
            python=(--python "$venv/bin/python")
        fi
    fi
fi
if ((${#python[@]} == 0)); then
    echo "Indexing is not compared: there is no Python with venv and pip here; name one in BENCH_PYTHON." >&2
fi
"$bench" index --folder "${registry[0]}" --files 5000 "${python[@]}"
"$bench" search
if ! "$bench" worker --services real --runs 1000 --in-flight 64; then
    echo "The benchmark on the real services did not run; the line above says why." >&2
    exit 1
fi
