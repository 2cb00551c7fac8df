"""The checks of deploy/: what is there passes, and each mistake that they are for is seen."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.checks import composition, dockerfile, kustomize, manifests, rules, schemas
from deploy.checks.containers import CASES
from deploy.checks.files import main

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = sorted((ROOT / "deploy" / "containers").glob("*.Dockerfile"))
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not kustomize.command(), reason="no kustomize or kubectl here: 'make check-deploy' fetches one"
    ),
]


@pytest.fixture(scope="module")
def built() -> list[manifests.Manifest]:
    return manifests.load(manifests.KUSTOMIZATIONS[1])


def test_everything_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "0 problems" in capsys.readouterr().out


# -- Kubernetes ------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def the(found: list[manifests.Manifest], name: str, space: str = "blindtail") -> dict[str, Any]:
    (one,) = [
        m for m in found if manifests.name_of(m) == name and m["metadata"].get("namespace", space) == space
    ]
    return one


def worker(cluster: dict[str, Any]) -> dict[str, Any]:
    template: dict[str, Any] = cluster["spec"]["workerGroupSpecs"][0]["template"]
    return template


def cell(cluster: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = worker(cluster)["spec"]["containers"][0]
    return container


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


CELLS, EDGE = "RayCluster/blindtail-cells", "StatefulSet/blindtail-edge"
ORCHESTRATOR = "Deployment/blindtail-orchestrator"
MISTAKES: dict[str, tuple[str, Change, str]] = {
    "a typo in a field": (ORCHESTRATOR, lambda m: m["spec"].update(replica=1), "replica"),
    "a typo deep in a pod of Ray": (
        CELLS,
        lambda m: cell(m).update(imagePullPolice="Always"),
        "imagePullPolice",
    ),
    "a wrong type": (ORCHESTRATOR, lambda m: m["spec"].update(replicas="1"), "replicas"),
    "a wrong type in a probe": (CELLS, lambda m: cell(m)["livenessProbe"].update(periodSeconds="x"), "x"),
    "an unknown field of RayCluster": (CELLS, lambda m: m["spec"].update(authOption={}), "authOption"),
    "no token": (CELLS, lambda m: m["spec"]["authOptions"].update(mode="disabled"), "token"),
    "no fault tolerance": (CELLS, lambda m: m["spec"].pop("gcsFaultToleranceOptions"), "gcsFaultTolerance"),
    "a password in the clear": (
        CELLS,
        lambda m: m["spec"]["gcsFaultToleranceOptions"].update(redisPassword={"value": "x"}),
        "redisPassword",
    ),
    "a wrong option of ray start": (
        CELLS,
        lambda m: m["spec"]["workerGroupSpecs"][0]["rayStartParams"].update({"num-cpu": "2"}),
        "num-cpu",
    ),
    "a root user": (EDGE, lambda m: pod(m)["securityContext"].update(runAsUser=0), "runAsNonRoot"),
    "root in Ray's pods": (
        CELLS,
        lambda m: worker(m)["spec"]["securityContext"].pop("runAsNonRoot"),
        "runAsNonRoot",
    ),
    "a writable root": (
        CELLS,
        lambda m: cell(m)["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem",
    ),
    "a capability": (
        EDGE,
        lambda m: pod(m)["containers"][0]["securityContext"].update(capabilities={"add": ["NET_RAW"]}),
        "drop ALL",
    ),
    "no seccomp": (EDGE, lambda m: pod(m)["securityContext"].pop("seccompProfile"), "RuntimeDefault"),
    "no limits": (CELLS, lambda m: cell(m)["resources"].pop("limits"), "resources.limits"),
    "no probe": (ORCHESTRATOR, lambda m: pod(m)["containers"][0].pop("livenessProbe"), "livenessProbe"),
    "a moving tag": (EDGE, lambda m: pod(m)["containers"][0].update(image="blindtail-edge:latest"), "pinned"),
    "an open secret": (
        ORCHESTRATOR,
        lambda m: next(v for v in pod(m)["volumes"] if "secret" in v)["secret"].pop("defaultMode"),
        "0440",
    ),
    "a token of the API": (EDGE, lambda m: pod(m).pop("automountServiceAccountToken"), "automountService"),
    "the host's network": (EDGE, lambda m: pod(m).update(hostNetwork=True), "hostNetwork"),
    "a small /dev/shm": (
        CELLS,
        lambda m: (
            worker(m)["spec"].update(volumes=[v for v in worker(m)["spec"]["volumes"] if v["name"] != "shm"])
            or cell(m).update(volumeMounts=[v for v in cell(m)["volumeMounts"] if v["name"] != "shm"])
        ),
        "/dev/shm",
    ),
    "a boundless emptyDir": (
        EDGE,
        lambda m: next(v for v in pod(m)["volumes"] if v["name"] == "tmp").update(emptyDir={}),
        "sizeLimit",
    ),
    "too little time to drain": (
        CELLS,
        lambda m: worker(m)["spec"].update(terminationGracePeriodSeconds=30),
        "drain",
    ),
    "evaluators without a core": (
        CELLS,
        lambda m: m["spec"]["workerGroupSpecs"][0]["rayStartParams"].update({"num-cpus": "1"}),
        "num-cpus",
    ),
    "two orchestrators on one file": (ORCHESTRATOR, lambda m: m["spec"].update(replicas=2), "SQLite"),
    "Ray's ports open to edges": (
        "NetworkPolicy/ray",
        lambda m: m["spec"]["ingress"][0]["from"].append(
            {"podSelector": {"matchLabels": {"blindtail.dev/client": "edge"}}}
        ),
        "Ray's ports",
    ),
    "Ray's port beside the gateway's": (
        "NetworkPolicy/cells",
        lambda m: m["spec"]["ingress"][0]["ports"].append({"protocol": "TCP", "port": 8265}),
        "Ray's ports",
    ),
    "a range of ports": (
        "NetworkPolicy/cells",
        lambda m: m["spec"]["ingress"][0]["ports"][0].update(endPort=60000),
        "Ray's ports",
    ),
    "every port": ("NetworkPolicy/cells", lambda m: m["spec"]["ingress"][0].pop("ports"), "Ray's ports"),
    "everybody": ("NetworkPolicy/ray", lambda m: m["spec"]["ingress"][0].pop("from"), "Ray's ports"),
    "no default deny": (
        "NetworkPolicy/default-deny",
        lambda m: m["spec"].update(ingress=[{}]),
        "denies by default",
    ),
    "Ray's dashboard as a Service": (
        "Service/blindtail-cells",
        lambda m: m["spec"]["ports"].append({"name": "dashboard", "port": 8265}),
        "behind a Service",
    ),
    "open to the world": (
        "Service/blindtail-cells",
        lambda m: m["spec"].update(type="LoadBalancer"),
        "outside",
    ),
    "a Service that finds nobody": (
        "Service/blindtail-cells",
        lambda m: m["spec"]["selector"].update({"app.kubernetes.io/name": "cell"}),
        "selects no pod",
    ),
    "a port that is not there": (
        "Service/blindtail-orchestrator",
        lambda m: m["spec"]["ports"][0].update(targetPort="rpc"),
        "no port rpc",
    ),
    "settings that are not there": (
        ORCHESTRATOR,
        lambda m: next(v for v in pod(m)["volumes"] if "configMap" in v)["configMap"].update(name="other"),
        "no ConfigMap",
    ),
    "an unknown field of a monitor": (
        "PodMonitor/blindtail-cell",
        lambda m: m["spec"]["podMetricsEndpoints"][0].update(intervall="5s"),
        "intervall",
    ),
    "a rule that is neither": (
        "PrometheusRule/blindtail",
        lambda m: m["spec"]["groups"][0]["rules"][0].pop("record"),
        "groups.0.rules.0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_manifest_is_seen(mistake: str, built: list[manifests.Manifest]) -> None:
    name, change, text = MISTAKES[mistake]
    changed = copy.deepcopy(built)
    change(the(changed, name, "blindtail-edge" if "edge" in name else "blindtail"))
    found = manifests.problems(changed)
    assert any(text in problem for problem in found), found
    assert manifests.problems(built) == []


def test_a_secret_in_a_manifest_is_seen(built: list[manifests.Manifest]) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "stringData": {"key": "value"}}
    assert any("content" in p for p in manifests.problems([*built, secret]))
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "x"},
        "rules": [],
    }
    assert any("rights" in p for p in manifests.problems([*built, role]))


def test_a_kind_without_a_schema_is_a_problem() -> None:
    found = schemas.problems({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}})
    assert any("no schema" in p for p in found)


def test_a_kustomization_that_does_not_build_is_said(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(ValueError, match="missing"):
        manifests.load(tmp_path)


def test_rules_are_a_true_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rules.problems() == []
    other = tmp_path / "rules.yaml"
    other.write_text(rules.COPY.read_text().replace("for: ", "for: 1", 1))
    monkeypatch.setattr(rules, "COPY", other)
    assert rules.problems()
    assert rules.main() == 0
    assert rules.problems() == []


# -- compose -----------------------------------------------------------------------------

COMPOSE_MISTAKES: dict[str, tuple[Change, str]] = {
    "a typo": (lambda s: s["edge"].update(shm_sze="1g"), "shm_sze"),
    "a wrong type": (lambda s: s["edge"].update(mem_limit=[1]), "mem_limit"),
    "an unknown network": (lambda s: s["edge"].update(networks=["nowhere"]), "nowhere"),
    "an unknown volume": (lambda s: s["edge"]["volumes"].append("nowhere:/x"), "nowhere"),
    "a file that is not there": (lambda s: s["edge"]["volumes"].append("./nothing:/x:ro"), "not there"),
    "a repository that may be written": (lambda s: s["edge"]["volumes"].append("./settings:/x"), "may write"),
    "root": (lambda s: s["cell-a"].update(user="0:0"), "user"),
    "no user": (lambda s: s["cell-a"].pop("user"), "user"),
    "a writable root": (lambda s: s["cell-b"].pop("read_only"), "read_only"),
    "a capability": (lambda s: s["cell-b"].update(cap_add=["NET_ADMIN"]), "cap_drop"),
    "new privileges": (lambda s: s["cell-b"].pop("security_opt"), "no-new-privileges"),
    "core dumps": (lambda s: s["cell-b"].pop("ulimits"), "core"),
    "a small /dev/shm": (lambda s: s["cell-b"].pop("shm_size"), "shm_size"),
    "an open port": (lambda s: s["grafana"].update(ports=["3000:3000"]), "every address"),
    "a moving tag": (lambda s: s["grafana"].update(image="grafana/grafana-oss:latest"), "pinned"),
    "no healthcheck": (lambda s: s["orchestrator"].pop("healthcheck"), "healthcheck"),
    "no time to drain": (lambda s: s["cell-a"].pop("stop_grace_period"), "stop_grace_period"),
    "a secret": (lambda s: s["grafana"]["environment"].update(ADMIN_PASSWORD="x"), "secret"),
    "another build argument": (lambda s: s["edge"]["build"].update(args={"EXTRA": "x"}), "build"),
}


@pytest.mark.parametrize("mistake", COMPOSE_MISTAKES)
def test_a_mistake_in_compose_is_seen(mistake: str) -> None:
    change, text = COMPOSE_MISTAKES[mistake]
    loaded = composition.load()
    assert composition.problems(loaded) == []
    changed = copy.deepcopy(loaded)
    change(changed["services"])
    found = composition.problems(changed)
    assert any(text in problem for problem in found), found


def test_sizes_and_durations() -> None:
    assert composition.bytes_of("512mb") == 512 << 20
    assert composition.seconds_of("1m30s") == 90
    for wrong in ("x", "5", ""):
        with pytest.raises(ValueError, match="not a duration"):
            composition.seconds_of(wrong)


# -- container files ---------------------------------------------------------------------

FILE_MISTAKES: dict[str, tuple[str, str, str]] = {
    "root": ("USER 65532:65532\n", "", "runs as root"),
    "a named user": ("USER 65532:65532", "USER blindtail", "fixed number"),
    "a moving base": ("debian:12.11-slim AS build", "debian:bookworm-slim AS build", "pin the base"),
    "no constraints": ("install -c constraints.txt cmake", "install cmake", "constraints"),
    "a compiler": ("python3 tini", "python3 tini g++", "g++ belongs into the build stage"),
    "Python's headers": ("python3 tini", "libpython3-dev python3 tini", "libpython3-dev belongs"),
    "git": ("python3-venv", "python3-venv git", "git has no place"),
    "recommended packages": ("--no-install-recommends ", "", "recommended"),
    "package lists": (" \\\n && rm -rf /var/lib/apt/lists/*\n", "\n", "package lists"),
    "a secret": ("PYTHONUNBUFFERED=1", "PYTHONUNBUFFERED=1 RAY_AUTH_TOKEN=abc", "secret"),
    "an index": ("pip install -c", "pip install --index-url https://example.com -c", "index"),
    "the whole folder": ("COPY blindtail blindtail", "COPY . .", "whole folder"),
    "shell form": ('ENTRYPOINT ["/usr/bin/tini", "--", "blindtail"]', "ENTRYPOINT blindtail", "shell form"),
    "another signal": ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL"),
    "no health": ("HEALTHCHECK", "# HEALTHCHECK", "no HEALTHCHECK"),
    "no build stage": ("COPY --from=build /opt/blindtail /opt/blindtail\n", "", "build stage"),
    "an unknown instruction": ("STOPSIGNAL SIGTERM", "ADD https://example.com/x /x", "ADD"),
}


@pytest.mark.parametrize("mistake", FILE_MISTAKES)
@pytest.mark.parametrize("path", CONTAINERS, ids=lambda p: p.stem)
def test_a_mistake_in_a_container_file_is_seen(path: Path, mistake: str) -> None:
    old, new, text = FILE_MISTAKES[mistake]
    whole = path.read_text()
    assert old in whole
    changed = whole.replace(old, new)
    if mistake == "no health":  # its second line with it
        changed = changed.replace('    CMD ["', '#   CMD ["')
    try:
        found = dockerfile.problems(dockerfile.parse(changed))
    except ValueError as error:
        found = [str(error)]
    assert any(text in problem for problem in found), found


def test_container_files_are_read_as_written() -> None:
    stages = dockerfile.parse(
        "FROM a:1.0 AS one\nRUN x \\\n # a note\n && y\nFROM b:2.0\n"
        'COPY --from=one /a /b\nENV A=1 B="2 3"\nCMD ["c", "d"]\n'
    )
    assert [(s.base, s.name) for s in stages] == [("a:1.0", "one"), ("b:2.0", "")]
    assert stages[0].instructions[0].value == "x && y"
    copied, environment, command = stages[1].instructions
    assert (copied.flags, copied.words()) == ({"from": "one"}, ["/a", "/b"])
    assert environment.pairs() == {"A": "1", "B": "2 3"}
    assert command.words() == ["c", "d"]
    for wrong in ("", "RUN x\n", "FROM a:1.0\nONBUILD RUN x\n"):
        with pytest.raises(ValueError, match=r"FROM|ONBUILD"):
            dockerfile.parse(wrong)


def test_what_images_copy_is_not_ignored() -> None:
    """The ignore file lets through what the COPY lines name, and nothing that they do not."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    for path in CONTAINERS:
        copied = {w for i in dockerfile.read(path)[0].all("COPY") for w in i.words()[:-1]}
        assert copied == kept
    assert "*" in lines


def test_every_container_file_is_tried() -> None:
    assert {case.file for case in CASES} == {path.name.partition(".")[0] for path in CONTAINERS}


def test_without_root_nothing_is_checked_and_that_is_said() -> None:
    code = (
        "import os; os.geteuid = lambda: 1000\n"
        "from deploy.checks import containers\nraise SystemExit(containers.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert "SKIPPED, NOTHING WAS CHECKED: this needs root" in done.stdout
    assert "No image is built here" in done.stdout
