#!/usr/bin/env bash
# Checks what no compiler sees: scripts, Compose, Prometheus, Alertmanager, Grafana, Kubernetes.
#
# A tool that is missing is named at the end as not run; with ATLAS_REQUIRE_SERVICES=1 (CI) that fails.
# KUBERNETES_VALIDATE may name the schema checker (pip install kubernetes-validate).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=()
missing=()
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# check NAME TOOL COMMAND…
check() {
    local name=$1 tool=$2
    shift 2
    if ! command -v "$tool" >/dev/null; then
        missing+=("$name ($tool)")
    elif "$@" >"$scratch/out" 2>&1; then
        printf 'ok      %s\n' "$name"
    else
        printf 'FAILED  %s\n' "$name"
        sed 's/^/        /' "$scratch/out"
        failed+=("$name")
    fi
}

shell_scripts() { git ls-files -z | xargs -0 grep -lZE '^#!(/usr/bin/env (ba)?sh|/bin/(ba)?sh)' -- | xargs -0 shellcheck; }

# Both Compose lines read the file differently: each that is here has to accept it. The secrets need not exist.
compose_v1() { docker-compose --file docker-compose.yml config --quiet; }
compose_v2() { docker compose --file docker-compose.yml config --quiet; }

# Each secret of docs/CONFIGURATION.md can be given as a file in every way to run Atlas, and none as a plain value.
secrets_are_files() {
    python3 - <<'PYTHON'
import glob, re, sys
secrets = re.findall(r"^\| `(\w+)` \*\(secret\)\*", open("docs/CONFIGURATION.md").read(), re.M)
assert len(secrets) >= 8, f"the table of settings reads differently now: {secrets}"
ways = {
    "Compose": ["docker-compose.yml"],
    "Kubernetes": glob.glob("deploy/kubernetes/**/*.yaml", recursive=True),
    "systemd": glob.glob("deploy/systemd/*.service"),
}
faults = []
for way, files in ways.items():
    text = "\n".join(open(file).read() for file in files)
    for name in secrets:
        # Migrations are not a service.
        if f"{name}_FILE" not in text and (way, name) != ("systemd", "SUPABASE_DB_URL"):
            faults.append(f"{way}: {name}_FILE is nowhere")
        if re.search(rf"\b{name}(:|=|, value)", text):
            faults.append(f"{way}: {name} is a plain value; give {name}_FILE")
compose = open("docker-compose.yml").read()
defined = compose[compose.index("\nsecrets:\n"):]
for name in set(re.findall(r"/run/secrets/(\w+)", compose)):
    if f"\n  {name}: " not in defined:
        faults.append(f"Compose: nothing defines the secret {name}")
sys.exit("\n".join(faults) or None)
PYTHON
}

prometheus_rules() {
    promtool check config --syntax-only deploy/prometheus/prometheus.yml &&
        promtool check rules deploy/prometheus/rules.yml &&
        promtool test rules deploy/prometheus/tests/*.yml
}

grafana_files() {
    python3 - <<'PYTHON'
import glob, json, sys
for path in glob.glob("dashboards/*.json"):
    board = json.load(open(path))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    ids = [panel["id"] for panel in board["panels"]]
    assert board["uid"] and board["title"], f"{path}: uid or title is missing"
    assert len(ids) == len(set(ids)), f"{path}: two panels share an id"
    for panel in panels:
        assert panel["datasource"]["uid"] == "atlas-prometheus", f"{path}: {panel['title']}: not the provisioned datasource"
        assert panel["targets"] and all(target["expr"] for target in panel["targets"]), f"{path}: {panel['title']}: no query"
    if not panels:
        sys.exit(f"{path}: no panels")
PYTHON
}

# The expressions of the dashboards, through promtool, as rules.
dashboard_queries() {
    python3 - >"$scratch/dashboards.yml" <<'PYTHON'
import glob, json
rules = []
for path in glob.glob("dashboards/*.json"):
    for panel in json.load(open(path))["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", "5m")
            rules.append({"record": f"check:panel{panel['id']}:{target['refId'].lower()}", "expr": expr})
print(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}))
PYTHON
    promtool check rules "$scratch/dashboards.yml"
}

# The base with every component: kustomize reads them only from a folder above.
kustomize_with_components() {
    cp -r deploy/kubernetes "$scratch/kubernetes"
    mkdir "$scratch/kubernetes/overlays/all"
    {
        printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../../base]\ncomponents:\n'
        find deploy/kubernetes/components -mindepth 1 -maxdepth 1 -type d -printf '  - ../../components/%f\n'
    } >"$scratch/kubernetes/overlays/all/kustomization.yaml"
    kubectl kustomize "$scratch/kubernetes/overlays/all"
}

kubernetes_renders() {
    kubectl kustomize deploy/kubernetes/base >"$scratch/base.yaml" &&
        kubectl kustomize deploy/kubernetes/overlays/example >"$scratch/example.yaml" &&
        kustomize_with_components >"$scratch/components.yaml"
}

kubernetes_schemas() { "$validate" --strict "$scratch"/base.yaml "$scratch"/example.yaml "$scratch"/components.yaml; }

check "scripts" shellcheck shell_scripts
check "Compose file, v1" docker-compose compose_v1
if docker compose version >/dev/null 2>&1; then
    check "Compose file, v2" docker compose_v2
else
    # Not everywhere to be had: never required.
    echo "NOT RUN Compose file, v2: no Compose v2 here"
fi
check "secrets come as files" python3 secrets_are_files
check "Prometheus config, alert rules and their tests" promtool prometheus_rules
check "Alertmanager config" amtool amtool check-config deploy/alertmanager/alertmanager.yml
check "Grafana dashboards" python3 grafana_files
check "Grafana queries" promtool dashboard_queries
check "metrics and runbooks" bash scripts/check_metrics.sh
check "Kubernetes files render" kubectl kubernetes_renders
validate=${KUBERNETES_VALIDATE:-kubernetes-validate}
check "Kubernetes files match their schemas" "$validate" kubernetes_schemas

for name in "${missing[@]}"; do
    echo "NOT RUN $name: the tool is not installed"
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "Failed: ${failed[*]}"
    exit 1
fi
if [[ ${#missing[@]} -gt 0 && ${ATLAS_REQUIRE_SERVICES:-0} == 1 ]]; then
    echo "ATLAS_REQUIRE_SERVICES=1: what is not run counts as failed."
    exit 1
fi
