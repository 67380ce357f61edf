#!/usr/bin/env bash
# Stands in for public images on a machine that reaches no image registry, so that our own images can be
# built and the Compose stack tried all the same. For development only: what it makes carries the names
# that docker-compose.yml and the Dockerfiles ask for, but is Debian underneath.
#
#   offline_base_images.sh build            debian, rust, Java, Cloud CLI: what our Dockerfiles build on
#   offline_base_images.sh services         postgres, redis, nginx, prometheus, alertmanager
#   offline_base_images.sh postgrest FILE   PostgREST; FILE is the program of postrust-server (crates.io)
#
# Needs root, a Docker engine and debootstrap; `build` takes this machine's Rust toolchain and Cloud CLI.
# Not stood in for: Qdrant and Grafana, which Debian does not have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
context=$scratch/context

# The full name of the image that one of our files asks for, by how it begins.
image() {
    local found
    found=$(grep -ohE "(image: |_IMAGE=)$1[A-Za-z0-9.:_-]*" \
        docker-compose.yml deploy/docker/Dockerfile deploy/pubsub-emulator/Dockerfile |
        sed -E 's/^(image: |_IMAGE=)//' | sort -u)
    if [[ -z $found || $found == *$'\n'* ]]; then
        echo "No single image $1 in our files: '$found'" >&2
        return 1
    fi
    printf '%s' "$found"
}

# stand_in NAME: that image, unless there is one, from the Dockerfile lines on standard input.
stand_in() {
    local name
    name=$(image "$1")
    mkdir -p "$context"
    {
        echo "FROM $(image debian:)"
        echo 'ENV DEBIAN_FRONTEND=noninteractive'
        cat
    } >"$context/Dockerfile"
    if [[ -z $(docker images --quiet "$name") ]]; then
        DOCKER_BUILDKIT=0 docker build --tag "$name" "$context"
    fi
    rm -rf "$context"
}

packages() {
    printf 'RUN apt-get update && apt-get install --yes --no-install-recommends %s && rm -rf /var/lib/apt/lists/*\n' "$*"
}

debian() {
    [[ -z $(docker images --quiet "$(image debian:)") ]] || return 0
    debootstrap --variant=minbase bookworm "$scratch/debian"
    tar -C "$scratch/debian" -c . | docker import - "$(image debian:)"
    rm -rf "$scratch/debian"
}

for_our_builds() {
    mkdir -p "$context/rust"
    tar -C "$(rustc --print sysroot)" --exclude=./share -c . | tar -C "$context/rust" -x
    # Whom this machine trusts, the image trusts: a mirror of crates.io may have a certificate of its own.
    cp /etc/ssl/certs/ca-certificates.crt "$context/"
    {
        packages gcc libc6-dev make ca-certificates
        echo 'COPY rust /usr/local/rust'
        echo 'COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt'
        echo 'ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin CARGO_HOME=/usr/local/cargo'
    } | stand_in rust:

    packages openjdk-17-jdk-headless | stand_in eclipse-temurin:17-jdk
    packages openjdk-17-jre-headless | stand_in eclipse-temurin:17-jre

    mkdir -p "$context"
    cp "$(deploy/pubsub-emulator/start.sh --jar)" "$context/emulator.jar"
    echo 'COPY emulator.jar /google-cloud-sdk/platform/pubsub-emulator/lib/' | stand_in google/cloud-sdk
}

services() {
    # What the official image's entry point does, in short.
    mkdir -p "$context"
    cat >"$context/entrypoint" <<'ENTRYPOINT'
#!/usr/bin/env bash
set -euo pipefail
export PGDATA=/var/lib/postgresql/data/main
if [[ ! -s $PGDATA/PG_VERSION ]]; then
    initdb --username=postgres --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust --auth-host=scram-sha-256
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    pg_ctl --wait --options="-c listen_addresses=''" start
    for script in /docker-entrypoint-initdb.d/*.sh; do bash "$script"; done
    pg_ctl --wait stop
fi
exec postgres -c listen_addresses='*'
ENTRYPOINT
    {
        packages postgresql-15
        echo 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        echo 'RUN install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data'
        # As in the official image, so that a tmpfs there takes the mode over.
        echo 'RUN chmod 3777 /var/run/postgresql'
        echo 'COPY entrypoint /entrypoint'
        echo 'ENTRYPOINT ["bash", "/entrypoint"]'
    } | stand_in postgres:

    {
        packages redis-server
        echo 'WORKDIR /data'
    } | stand_in redis:

    {
        packages nginx-light wget
        echo 'USER 33:33'
        echo 'ENTRYPOINT ["nginx", "-g", "daemon off;"]'
    } | stand_in nginxinc/nginx-unprivileged

    local name
    for name in prometheus alertmanager; do
        {
            packages "$([[ $name == alertmanager ]] && echo prometheus-)$name" wget
            echo "RUN install -d -o nobody -g nogroup /$name"
            echo 'USER nobody'
            echo "ENTRYPOINT [\"$([[ $name == alertmanager ]] && echo prometheus-)$name\"]"
        } | stand_in "prom/$name"
    done
}

# postrust speaks PostgREST's protocol; the wrapper gives it PostgREST's way of naming files, and its health check.
postgrest() {
    mkdir -p "$context"
    cp "$1" "$context/postrust"
    cat >"$context/postgrest" <<'WRAPPER'
#!/usr/bin/env bash
set -euo pipefail
if [[ ${1:-} == --ready ]]; then
    exec 3<>"/dev/tcp/127.0.0.1/$PGRST_SERVER_PORT"
    exit
fi
for name in PGRST_DB_URI PGRST_JWT_SECRET; do
    value=${!name}
    [[ $value == @* ]] && export "$name=$(cat "${value#@}")"
done
export PGRST_COMPAT_MODE=true PGRST_DB_CHANNEL_ENABLED=true
exec postrust
WRAPPER
    {
        packages ca-certificates
        echo 'COPY postrust postgrest /usr/local/bin/'
        echo 'RUN chmod 755 /usr/local/bin/*'
        echo 'ENTRYPOINT ["postgrest"]'
    } | stand_in postgrest/postgrest
}

case ${1:-} in
    build)
        debian
        for_our_builds
        ;;
    services)
        debian
        services
        ;;
    postgrest)
        debian
        postgrest "${2:?usage: offline_base_images.sh postgrest FILE}"
        ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 2
        ;;
esac
