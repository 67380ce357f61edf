#!/usr/bin/env bash
# Breaks the code on purpose, one mutation at a time, and says which test noticed. A mutation that none
# notices is a hole in the tests, and the exit code is 1.
#
#   scripts/mutate.sh              all of scripts/mutations
#   scripts/mutate.sh 05 check-    those whose file names contain one of these
#   scripts/mutate.sh --check      only whether every patch still applies (a moment)
#
# A patch begins with what it breaks and with the tests that should notice (`test: TARGET FILTER`). The
# Rust ones are applied together in a throw-away worktree and built once; ATLAS_MUTANT picks one of them at
# run time. Those of kind `sql` change migrations, which tests read when they run, so they are applied in turn.
# What is tried is the last commit. Needs Postgres and the Pub/Sub emulator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo=${CARGO:-cargo}
# Its own, because cargo takes what was built from one worktree for fresh in another. So the first run
# builds every dependency once more.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/mutations
export ATLAS_REQUIRE_SERVICES=1 RUST_BACKTRACE=0
# A mutation can make a test wait for ever.
limit=240

temp=$(mktemp -d)
tree=$temp/atlas
cleanup() {
    git worktree remove --force "$tree" 2>/dev/null || true
    rm -rf "$temp"
}
trap cleanup EXIT
git worktree add --quiet --detach "$tree" HEAD

name_of() { basename "$1" .patch | cut -d- -f2-; }
tests_of() { sed -n 's/^test: //p' "$1"; }
is_sql() { grep -q '^kind: sql$' "$1"; }

patches=("$PWD"/scripts/mutations/*.patch)
for patch in "${patches[@]}"; do
    if ! git -C "$tree" apply "$patch"; then
        echo "$(basename "$patch") does not apply any more: write it anew for the code as it is" >&2
        exit 2
    fi
    if is_sql "$patch"; then git -C "$tree" apply --reverse "$patch"; fi
done
if [[ ${1:-} == --check ]]; then
    echo "all ${#patches[@]} patches apply"
    exit
fi

chosen=()
for patch in "${patches[@]}"; do
    [[ -n $(tests_of "$patch") ]] || continue
    if [[ $# -eq 0 ]]; then chosen+=("$patch"); fi
    for part in "$@"; do
        if [[ $(basename "$patch") == *"$part"* ]]; then chosen+=("$patch"); fi
    done
done

echo "building ${#patches[@]} mutations at once"
targets=()
while read -r target; do targets+=(--test "$target"); done < <(tests_of <(cat "${chosen[@]}") | cut -d' ' -f1 | sort -u)
(cd "$tree" && "$cargo" test --locked --workspace --no-run "${targets[@]}" --message-format=json) >"$temp/built"

# try PATCH MUTANT: runs its tests; prints those that failed. Succeeds when all passed.
try() {
    local target filter executable passed=0
    while read -r target filter; do
        executable=$(sed -n "s|.*\"executable\":\"\([^\"]*/$target-[0-9a-f]*\)\".*|\1|p" "$temp/built" | tail -n 1)
        if ! (cd "$tree/worker" && ATLAS_MUTANT=$2 timeout "$limit" "$executable" "$filter") >"$temp/log" 2>&1; then
            passed=1
            sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$temp/log"
        fi
        grep -q '^running [1-9]' "$temp/log" || { echo "no test is called $filter" >&2; exit 2; }
    done < <(tests_of "$1")
    return "$passed"
}

missed=0
for patch in "${chosen[@]}"; do
    name=$(name_of "$patch")
    if ! failed=$(try "$patch" none); then
        echo "$name: its tests fail without it too: $failed" >&2
        exit 2
    fi
    if is_sql "$patch"; then git -C "$tree" apply "$patch"; fi
    if failed=$(try "$patch" "$name"); then
        missed=$((missed + 1))
        failed="NOT CAUGHT"
    fi
    if is_sql "$patch"; then git -C "$tree" apply --reverse "$patch"; fi
    printf '%-36s %s\n' "$name" "$(paste -sd, <<<"${failed:-timed out}" | sed 's/,/, /g')"
done
if ((missed)); then
    echo "$missed not caught" >&2
    exit 1
fi
