"""What lies in deploy/ fits the service it deploys."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from benchmarks.proxy import NGINX, check
from dverge_serve.serving.app import App
from dverge_serve.serving.metrics import Metrics
from dverge_serve.serving.responses import CODES
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.watch import HEADER
from dverge_serve.serving.worker import Worker

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")
# Prometheus adds these to every series that it scrapes.
TARGET_LABELS = {"instance", "job"}
VARIABLES = {f"DVERGE_{field.name.upper()}" for field in dataclasses.fields(Settings)}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def document(name: str, kind: str) -> Any:
    (found,) = (value for value in documents(name) if value["kind"] == kind)
    return found


def series() -> dict[str, set[str]]:
    """Return every series that the service can show, with its labels."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for family in metrics._registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        labels = {
            "dverge_requests": {"route", "method", "status"},
            "dverge_request_seconds": {"route", "le"},
            "dverge_refusals": {"code"},
            "dverge_predictions": {"label"},
            "dverge_model_info": {"name", "sha256"},
        }.get(family.name, {"le"} if family.type == "histogram" else set())
        for suffix in suffixes.get(family.type, ("",)):
            found[family.name + suffix] = labels
    return found


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_expression_asks_for_series_that_exist(expression: str) -> None:
    known = series()
    names = set(re.findall(r"dverge_\w+", expression))
    assert names
    assert names <= set(known)
    for name, matchers in re.findall(r"(dverge_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= known[name]
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")}
    assert labels <= TARGET_LABELS.union(*(known[name] for name in names))
    for code in re.findall(r'code="(\w+)"', expression):
        assert code in CODES
    assert expression.count("(") == expression.count(")")


def test_alerts_are_complete() -> None:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description"} <= set(rule["annotations"])


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_takes_rules_and_configuration_and_fires_when_it_should(tmp_path: Path) -> None:
    assert PROMTOOL
    token, config = tmp_path / "token", tmp_path / "prometheus.yaml"
    token.write_text("secret")
    text = (DEPLOY / "prometheus.yaml").read_text()
    for inside, here in (
        ("/etc/prometheus/alerts.yaml", DEPLOY / "alerts.yaml"),
        ("/run/secrets/token", token),
    ):
        assert inside in text
        text = text.replace(inside, str(here))
    config.write_text(text)
    rules = Path(__file__).parent / "alerts.yaml"
    for command in (["check", "config", str(config)], ["test", "rules", str(rules)]):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert any("dverge_suspicious_total" in panel["targets"][0]["expr"] for panel in panels)
    assert any("dverge_near_copies_over" in panel["targets"][1]["expr"] for panel in panels[9:])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


@pytest.mark.parametrize("kind", [value["kind"] for value in documents("kubernetes.yaml")])
def test_manifests_pass_the_schema(kind: str) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document("kubernetes.yaml", kind), version, strict=True)


def _container(name: str) -> Any:
    if name == "kserve.yaml":
        return document(name, "ServingRuntime")["spec"]["containers"][0]
    return document(name, "Deployment")["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kserve.yaml"])
def test_containers_are_locked_down_and_probed(name: str) -> None:
    container = _container(name)
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {"requests", "limits"} <= set(container["resources"])
    assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
    routes = App(Worker(Settings()), expose="full").routes
    for probe in ("readinessProbe", "livenessProbe"):
        route = routes[container[probe]["httpGet"]["path"]]
        assert route.public, "the kubelet has no token"
    assert "live" in container["livenessProbe"]["httpGet"]["path"]
    assert "ready" in container["readinessProbe"]["httpGet"]["path"]
    variables = {entry["name"] for entry in container["env"]}
    assert variables <= VARIABLES


def test_pods_run_as_nobody_in_particular_and_have_time_to_end() -> None:
    pod = document("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {pod['securityContext']['runAsUser']}" in (DEPLOY / "Dockerfile").read_text()
    assert pod["enableServiceLinks"] is False
    wait = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= wait + 2 * Settings().timeout_s


def test_the_parts_of_kubernetes_find_each_other() -> None:
    deployment = document("kubernetes.yaml", "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert document("kubernetes.yaml", "Service")["spec"]["selector"] == labels
    (port,) = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    (served,) = document("kubernetes.yaml", "Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    assert f"EXPOSE {port['containerPort']}" in (DEPLOY / "Dockerfile").read_text()
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert document("kubernetes.yaml", kind)["spec"][key]["matchLabels"] == labels
    (rule,) = document("kubernetes.yaml", "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": port["name"]}]
    assert all(source.keys() <= {"podSelector", "namespaceSelector"} for source in rule["from"])


def test_kubernetes_scales_by_the_queue_that_prometheus_sees() -> None:
    deployment = document("kubernetes.yaml", "Deployment")
    assert "replicas" not in deployment["spec"], "an apply would undo what the autoscaler did"
    scaler = document("kubernetes.yaml", "HorizontalPodAutoscaler")["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    (asked,) = (metric["pods"] for metric in scaler["metrics"] if metric["type"] == "Pods")
    name = asked["metric"]["name"]
    assert name in series()
    # Far below what is refused, and no more than waits for one further batch.
    assert int(asked["target"]["averageValue"]) <= Settings().queue / 8
    (rule,) = documents("prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert "as" not in rule.get("name", {}), "the series keeps its name"
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    monitor = document("podmonitor.yaml", "PodMonitor")["spec"]
    pod = deployment["spec"]["template"]
    assert monitor["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (container,) = pod["spec"]["containers"]
    assert endpoint["port"] == container["ports"][0]["name"]
    assert endpoint["path"] in App(Worker(Settings()), expose="full").routes
    (secret,) = (e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e)
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": secret}


def test_kserve_reaches_our_v2_routes() -> None:
    runtime = document("kserve.yaml", "ServingRuntime")["spec"]
    service = document("kserve.yaml", "InferenceService")
    assert runtime["protocolVersions"] == ["v2"]
    model = service["spec"]["predictor"]["model"]
    formats = [entry["name"] for entry in runtime["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats
    assert model["runtime"] == document("kserve.yaml", "ServingRuntime")["metadata"]["name"]
    # KServe asks for /v2/models/<name of the service>/infer.
    path = f"/v2/models/{service['metadata']['name']}/infer"
    assert path in App(Worker(Settings()), expose="full").routes
    container = runtime["containers"][0]
    port = container["args"][container["args"].index("--port") + 1]
    assert container["ports"][0]["containerPort"] == int(port)


def test_the_image_copies_what_the_package_is_made_of_and_nothing_else() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parent
    lines = re.findall(r"^COPY (.*) /src", dockerfile, re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    for name in copied:
        assert (root / name).exists(), name
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(wheel["targets"]["wheel"]["packages"]) <= copied


def test_grafana_finds_its_dashboard_and_prometheus() -> None:
    volumes = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"][
        "volumes"
    ]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in volumes}
    (source,) = _provisioned("datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = _provisioned("dashboards/dverge.yaml")["providers"]
    (shown,) = [inside for inside in mounted if inside.startswith(provider["options"]["path"])]
    assert json.loads((DEPLOY / mounted[shown]).read_text())["panels"]
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"


def _provisioned(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "grafana" / "provisioning" / name).read_text())


def test_compose_hides_the_service_behind_the_proxy() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["dverge"]
    assert "ports" not in service
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    variables = dict(line.partition("=")[::2] for line in service["environment"])
    assert set(variables) <= VARIABLES
    # An unset variable must not reach the service as an empty one, nor the other way round.
    assert "DVERGE_MODEL_PUBLIC_KEY" in service["environment"]
    assert not [line for line in service["environment"] if ":-" in line]
    assert int(service["stop_grace_period"].rstrip("s")) >= 2 * Settings().timeout_s
    for part in compose["services"].values():
        for volume in part.get("volumes", []):
            source = volume.split(":")[0]
            assert source in ("../models", "../keys") or (DEPLOY / source).exists(), source


def test_proxy_and_prometheus_find_every_replica_of_compose() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services["dverge"]["deploy"]["replicas"] == 2
    (port,) = services["dverge"]["expose"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert (found["names"], found["type"], str(found["port"])) == (["dverge"], "A", port)
    assert job["metrics_path"] in App(Worker(Settings()), expose="full").routes
    assert services["prometheus"]["secrets"] == [
        Path(job["authorization"]["credentials_file"]).name
    ]
    text = (DEPLOY / "nginx.conf").read_text()
    assert re.search(rf"server dverge:{port} resolve .*;", text)
    # Only then does nginx ask for the name again; it needs 1.27.3 for that.
    assert re.search(r"resolver 127\.0\.0\.11 valid=\ds", text)
    assert re.search(r"upstream dverge \{\s+zone ", text)
    version = services["proxy"]["image"].removeprefix("nginx:").split("-")[0]
    assert tuple(map(int, version.split("."))) > (1, 27)
    (published,) = services["proxy"]["ports"]
    assert f"listen {published.split(':')[1]};" in text


def test_the_proxy_agrees_with_the_services_limits() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    settings = Settings()
    directives = dict(re.findall(r"^\s*(\w+) ([^;{]+);", text, re.MULTILINE))
    assert int(directives["client_max_body_size"]) == settings.max_body_bytes
    assert int(directives["proxy_read_timeout"].rstrip("s")) >= math.ceil(settings.timeout_s)
    assert int(directives["client_header_timeout"].rstrip("s")) <= 30
    assert directives["proxy_hide_header"].lower() == HEADER.decode()
    # Another replica is not asked once a slow answer has timed out.
    again = int(directives["proxy_next_upstream_timeout"].rstrip("s"))
    assert again < int(directives["proxy_read_timeout"].rstrip("s"))
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(not NGINX, reason="nginx is not installed (Debian: nginx-light)")
def test_nginx_takes_the_configuration(tmp_path: Path) -> None:
    assert "test is successful" in check([3001, 3002], tmp_path)


def test_the_image_is_non_root_and_checks_its_health() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert "/readyz" in text
    assert set(re.findall(r"DVERGE_\w+", text)) <= VARIABLES
