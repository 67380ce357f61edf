#!/usr/bin/env bash
# Makes the development stack's secrets, once: random passwords, API keys, and a service-role key
# (a JWT, as Supabase hands out) signed with a random secret. Existing files are left alone.
#
# The files are readable by all, because the containers' users must read them, and the folder above
# them is closed to everyone but you.
set -euo pipefail

dir=${1:?usage: dev_secrets.sh FOLDER}
umask 077
mkdir -p "$dir"
umask 022

# keep NAME COMMAND…: the command's output becomes the secret, unless there is one.
keep() {
    local name=$1
    shift
    [[ -s $dir/$name ]] && return
    "$@" >"$dir/.$name.new"
    chmod 644 "$dir/.$name.new"
    mv "$dir/.$name.new" "$dir/$name"
}

# Without a line end: some readers of these files would take it for a part of the secret.
random() { printf '%s' "$(openssl rand -hex 24)"; }
read_secret() { cat "$dir/$1"; }
# As `atlas key hash` does it: the gateway's file of keys holds no key.
hash_of() { openssl dgst -sha256 -r "$dir/$1" | cut -d ' ' -f 1; }
base64url() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }

# RFC 7519, HS256; good for ten years, on this machine's stack only.
service_role_jwt() {
    local now head body
    now=$(date +%s)
    head=$(printf '{"alg":"HS256","typ":"JWT"}' | base64url)
    body=$(printf '{"iss":"atlas-dev","role":"service_role","iat":%d,"exp":%d}' \
        "$now" $((now + 10 * 365 * 86400)) | base64url)
    printf '%s.%s.%s' "$head" "$body" \
        "$(printf '%s.%s' "$head" "$body" | openssl dgst -sha256 -hmac "$(read_secret jwt_secret)" -binary | base64url)"
}

# A file of an older release holds the keys themselves, which the gateway no longer takes.
if [[ -s $dir/api_keys ]] && ! grep -q ':sha256:' "$dir/api_keys"; then
    rm "$dir/api_keys"
fi

for name in postgres_password authenticator_password jwt_secret worker_rag_api_key cli_rag_api_key grafana_password \
    qdrant_api_key redis_password; do
    keep "$name" random
done
keep database_url printf 'postgres://postgres:%s@postgres:5432/postgres' "$(read_secret postgres_password)"
keep authenticator_url printf 'postgres://authenticator:%s@postgres:5432/postgres' "$(read_secret authenticator_password)"
keep service_role_key service_role_jwt
keep api_keys printf 'worker:sha256:%s\ncli:sha256:%s\n' \
    "$(hash_of worker_rag_api_key)" "$(hash_of cli_rag_api_key)"
# What the two servers themselves read.
keep qdrant_config printf 'service:\n  api_key: "%s"\n' "$(read_secret qdrant_api_key)"
keep redis_config printf 'requirepass %s\n' "$(read_secret redis_password)"
keep redis_url printf 'redis://:%s@redis:6379/0' "$(read_secret redis_password)"
