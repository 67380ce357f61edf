#!/usr/bin/env bash
# Starts the Google Pub/Sub emulator with the cures for its ghost streams (see InternalStatus.java) and for
# its leases that never end (see MessageBacklog.java).
# Tests, `make e2e` and the compose stack all start it through this script.
#
#   start.sh [--host HOST] [--port PORT]     defaults: 127.0.0.1 8085
#   start.sh --compile                       only compile the cures (image builds: a JRE is enough later)
#   start.sh --jar                           only print where the emulator's jar is
#
# ATLAS_PUBSUB_EMULATOR_JAR   the jar; otherwise it is looked for in the Google Cloud CLI
# ATLAS_PUBSUB_SHIM_DIR       where the compiled cures are kept; otherwise the user's cache folder
# ATLAS_PUBSUB_JAVA_OPTS      options for the Java machine
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "pubsub-emulator: $*" >&2
    exit 1
}

find_jar() {
    if [[ -n ${ATLAS_PUBSUB_EMULATOR_JAR:-} ]]; then
        [[ -f $ATLAS_PUBSUB_EMULATOR_JAR ]] || fail "ATLAS_PUBSUB_EMULATOR_JAR names no file: $ATLAS_PUBSUB_EMULATOR_JAR"
        echo "$ATLAS_PUBSUB_EMULATOR_JAR"
        return
    fi
    local roots=(/usr/lib/google-cloud-sdk /opt/google-cloud-sdk /google-cloud-sdk "${HOME:-/root}/google-cloud-sdk" /usr/share/google-cloud-sdk)
    local gcloud
    if gcloud=$(command -v gcloud); then
        # .../google-cloud-sdk/bin/gcloud, behind any number of links.
        roots=("$(dirname "$(dirname "$(readlink -f "$gcloud")")")" "${roots[@]}")
    fi
    local root jar
    for root in "${roots[@]}"; do
        for jar in "$root"/platform/pubsub-emulator/lib/*.jar; do
            if [[ -f $jar ]]; then
                echo "$jar"
                return
            fi
        done
    done
    fail "its jar was not found. Install it (gcloud components install pubsub-emulator beta, or the Debian package google-cloud-cli-pubsub-emulator), or set ATLAS_PUBSUB_EMULATOR_JAR."
}

host=127.0.0.1
port=8085
compile_only=false
while [[ $# -gt 0 ]]; do
    case $1 in
        --host) host=${2:?} && shift 2 ;;
        --host=*) host=${1#*=} && shift ;;
        --port) port=${2:?} && shift 2 ;;
        --port=*) port=${1#*=} && shift ;;
        --compile) compile_only=true && shift ;;
        --jar) find_jar && exit ;;
        *) fail "unknown option $1" ;;
    esac
done

jar=$(find_jar)
shim=${ATLAS_PUBSUB_SHIM_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/atlas/pubsub-shim/$(basename "$jar" .jar)}
# shellcheck disable=SC2016  # a dollar sign in the name of a class
cures=(
    'io/grpc/InternalStatus.class'
    # The outer class is only there to compile against: the jar's own must win.
    'com/google/cloud/pubsub/testing/v1/MessageBacklog$ExpireOutstandingMessagesRunnable.class'
)
stale=false
for cure in "${cures[@]}"; do
    [[ -f $shim/$cure && ! $here/InternalStatus.java -nt $shim/$cure && ! $here/MessageBacklog.java -nt $shim/$cure ]] || stale=true
done
if $stale; then
    command -v javac >/dev/null || fail "javac is missing: install a JDK 17 or newer, or compile the cures elsewhere with --compile"
    mkdir -p "$shim"
    # Compiled aside and moved, so that two starts at once never see half a class.
    aside=$(mktemp -d "$shim/compile.XXXXXX")
    javac --release 17 -cp "$jar" -d "$aside" "$here/InternalStatus.java"
    # Not against the jar: it would bring its own inner class.
    javac --release 17 -d "$aside" "$here/MessageBacklog.java"
    for cure in "${cures[@]}"; do
        mkdir -p "$(dirname "$shim/$cure")"
        mv -f "$aside/$cure" "$shim/$cure"
    done
    rm -rf "$aside"
fi
if $compile_only; then
    exit
fi
command -v java >/dev/null || fail "java is missing: install a JRE 17 or newer"

read -ra java_opts <<<"${ATLAS_PUBSUB_JAVA_OPTS:--Xmx512m}"

# The shim comes first: its classes win over the jar's.
exec java "${java_opts[@]}" -cp "$shim:$jar" com.google.cloud.pubsub.testing.v1.Main "--host=$host" "--port=$port"
