"""Kubernetes manifests: built by kustomize, held to schemas and to our rules."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.checks import kustomize, schemas

Manifest = dict[str, Any]
FOLDER = Path(__file__).resolve().parents[1] / "kubernetes"
KUSTOMIZATIONS = (FOLDER / "base", FOLDER / "overlays" / "dev")
#: Ray's control store, dashboard and client: open to its own cluster only; 6379 of Redis to Ray's head.
RAY_PORTS = {6379, 8265, 10001}
RAY_LABEL = "ray.io/cluster"
#: Kubernetes sends SIGTERM, and SIGKILL so much later: beyond the drain, evaluations in flight must end.
DRAIN_MARGIN_S = 20.0


def load(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization. Raises `ValueError`."""
    return [document for document in yaml.safe_load_all(kustomize.build(folder)) if document]


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong, each with its kind and name."""
    found = []
    for manifest in manifests:
        at = name_of(manifest)
        found += [f"{at}: {p}" for p in schemas.problems(manifest)]
        found += [f"{at}: {p}" for p in _object_problems(manifest)]
        for template in templates(manifest):
            found += [f"{at}: {p}" for p in pod_problems(template)]
    return found + _network_problems(manifests) + _reference_problems(manifests) + _drain_problems(manifests)


def name_of(manifest: Mapping[str, Any]) -> str:
    return f"{manifest.get('kind')}/{(manifest.get('metadata') or {}).get('name')}"


def templates(manifest: Manifest) -> list[Manifest]:
    """Every pod template in it."""
    spec = manifest.get("spec") or {}
    own = spec.get("template") if isinstance(spec, dict) else None
    return [own] if isinstance(own, dict) else schemas.ray_templates(manifest)


# -- one pod ------------------------------------------------------------------------


def pod_problems(template: Manifest) -> list[str]:
    """Our rules for every pod."""
    spec = template.get("spec") or {}
    found = []
    if spec.get("automountServiceAccountToken") is not False:
        found.append("automountServiceAccountToken must be false: nothing here calls the Kubernetes API")
    found += [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    pod = spec.get("securityContext") or {}
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
        found.append("runAsNonRoot and a runAsUser above 0 are needed")
    if (pod.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        found.append("seccompProfile must be RuntimeDefault")
    volumes = {v["name"]: v for v in spec.get("volumes") or []}
    for volume in volumes.values():
        found += _volume_problems(volume)
    for container in [*(spec.get("containers") or []), *(spec.get("initContainers") or [])]:
        found += [f"{container.get('name')}: {p}" for p in _container_problems(container, volumes)]
    return found


def _volume_problems(volume: Manifest) -> list[str]:
    found, name = [], volume["name"]
    if "hostPath" in volume:
        found.append(f"volume {name} is a hostPath")
    if "secret" in volume and (volume["secret"].get("defaultMode", 0o644) & 0o007):
        found.append(f"volume {name}: a secret that every user may read: defaultMode 0440")
    if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
        found.append(f"volume {name}: an emptyDir without sizeLimit")
    return found


def _container_problems(container: Manifest, volumes: Mapping[str, Manifest]) -> list[str]:
    found = []
    context = container.get("securityContext") or {}
    if context.get("readOnlyRootFilesystem") is not True:
        found.append("readOnlyRootFilesystem must be true")
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        found.append("allowPrivilegeEscalation must be false")
    if (context.get("capabilities") or {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
        found.append("capabilities: drop ALL and add none")
    if context.get("runAsUser") == 0:
        found.append("runs as root")
    resources = container.get("resources") or {}
    for kind in ("requests", "limits"):
        if missing := {"cpu", "memory"} - set(resources.get(kind) or {}):
            found.append(f"resources.{kind} lacks {', '.join(sorted(missing))}")
    found += [f"no {probe}" for probe in ("startupProbe", "livenessProbe") if not container.get(probe)]
    image = str(container.get("image", ""))
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and not re.match(r"\d", tag):
        found.append(f"image {image!r} is not pinned to a version")
    found += [
        f"environment {e['name']} looks like a secret in the clear: use valueFrom"
        for e in container.get("env") or []
        if re.search(r"(?i)password|token|secret", e["name"]) and e.get("value")
    ]
    command = " ".join(map(str, [*(container.get("command") or []), *(container.get("args") or [])]))
    if "RAY_START_CMD" in command or "blindtail edge" in command:  # Ray's object store lies there
        shm = [
            volumes[m["name"]] for m in container.get("volumeMounts") or [] if m["mountPath"] == "/dev/shm"
        ]
        if not shm or (shm[0].get("emptyDir") or {}).get("medium") != "Memory":
            found.append("/dev/shm must be an emptyDir of medium Memory: a container's own has 64 MB")
    return found


# -- objects and how they hang together -------------------------------------------------


def _object_problems(manifest: Manifest) -> list[str]:
    kind, spec = manifest.get("kind"), manifest.get("spec") or {}
    found = []
    if kind == "Secret" and (manifest.get("data") or manifest.get("stringData")):
        found.append("a secret's content must not be in a manifest")
    if kind == "ServiceAccount" and manifest.get("automountServiceAccountToken") is not False:
        found.append("automountServiceAccountToken must be false")
    if kind == "Service":
        if spec.get("type", "ClusterIP") != "ClusterIP":
            found.append(f"type {spec['type']} opens it to outside the cluster")
        ports = {p.get("port") for p in spec.get("ports") or []} | {
            p.get("targetPort") for p in spec.get("ports") or []
        }
        if ports & (RAY_PORTS - {6379}) or (6379 in ports and "redis" not in manifest["metadata"]["name"]):
            found.append("a port of Ray must not be behind a Service of ours")
    alone = spec.get("replicas") == 1 and (spec.get("strategy") or {}).get("type") == "Recreate"
    if kind == "Deployment" and "orchestrator" in manifest["metadata"]["name"] and not alone:
        found.append("SQLite: one replica and strategy Recreate")
    if kind in {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}:
        found.append("nothing here needs rights on the Kubernetes API")
    return found


def _network_problems(manifests: list[Manifest]) -> list[str]:
    """Every namespace denies by default, and Ray's ports are open to Ray's own pods alone."""
    found = []
    policies = [m for m in manifests if m.get("kind") == "NetworkPolicy"]
    closed = {
        p["metadata"].get("namespace")
        for p in policies
        if p["spec"].get("podSelector") == {}
        and set(p["spec"].get("policyTypes") or []) == {"Ingress", "Egress"}
        and not p["spec"].get("ingress")
        and not p["spec"].get("egress")
    }
    for manifest in manifests:
        space = manifest["metadata"].get("namespace")
        if templates(manifest) and space not in closed:
            found.append(
                f"{name_of(manifest)}: its namespace {space!r} has no NetworkPolicy that denies by default"
            )
    for policy in policies:
        for rule in policy["spec"].get("ingress") or []:
            ports = {port.get("port") for port in rule.get("ports") or []}
            if ports and not ports & RAY_PORTS and not any("endPort" in p for p in rule["ports"]):
                continue
            if not all(_inside_ray(peer) for peer in rule.get("from") or [{}]):
                found.append(f"{name_of(policy)}: Ray's ports are open to others than the Ray cluster's pods")
    return found


def _inside_ray(peer: Manifest) -> bool:
    """A peer of this namespace that is a pod of the Ray cluster."""
    labels = (peer.get("podSelector") or {}).get("matchLabels") or {}
    ours = RAY_LABEL in labels or labels.get("app.kubernetes.io/name") == "blindtail-ray-head"
    return ours and "namespaceSelector" not in peer and "ipBlock" not in peer


def _reference_problems(manifests: list[Manifest]) -> list[str]:
    """Config maps and accounts that pods name are there; Services and monitors find the ports they name."""
    there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    pods = [(name_of(m), t) for m in manifests for t in templates(m)]
    found = []
    for at, template in pods:
        spec = template["spec"]
        if ("ServiceAccount", spec.get("serviceAccountName")) not in there:
            found.append(f"{at}: there is no ServiceAccount {spec.get('serviceAccountName')!r}")
        for volume in spec.get("volumes") or []:
            name = (volume.get("configMap") or {}).get("name", "")
            # A model's file is not in the repository's manifests: see the README.
            if name and ("ConfigMap", name) not in there and not name.endswith("-model"):
                found.append(f"{at}: there is no ConfigMap {name!r}")
    for manifest in manifests:
        spec = manifest.get("spec") or {}
        if manifest["kind"] == "Service":
            wanted, named = spec.get("selector") or {}, {p.get("targetPort") for p in spec.get("ports") or []}
        elif manifest["kind"] == "PodMonitor":
            wanted = spec["selector"]["matchLabels"]
            named = {e["port"] for e in spec["podMetricsEndpoints"]}
        else:
            continue
        # KubeRay adds its own labels to the pods that it makes.
        wanted = {k: v for k, v in wanted.items() if not k.startswith("ray.io/")}
        chosen = [t for _, t in pods if wanted.items() <= (t["metadata"].get("labels") or {}).items()]
        if not chosen:
            if manifest["kind"] == "PodMonitor" and "edge" in manifest["metadata"]["name"]:
                continue  # edges live elsewhere
            found.append(f"{name_of(manifest)}: it selects no pod")
        for template in chosen:
            ports = {p.get("name") for c in template["spec"]["containers"] for p in c.get("ports") or []}
            if missing := {n for n in named if isinstance(n, str)} - ports:
                found.append(f"{name_of(manifest)}: the pods have no port {', '.join(sorted(missing))}")
    return found


def settings(manifests: Iterable[Manifest]) -> dict[str, dict[str, Any]]:
    """The TOML files in config maps, parsed, by file name."""
    return {
        name: tomllib.loads(text)
        for m in manifests
        if m["kind"] == "ConfigMap"
        for name, text in (m.get("data") or {}).items()
        if name.endswith(".toml")
    }


def _drain_problems(manifests: list[Manifest]) -> list[str]:
    cell = settings(manifests).get("cell.toml", {})
    found = []
    for manifest in manifests:
        for template in schemas.ray_templates(manifest)[1:]:
            grace_s = template["spec"].get("terminationGracePeriodSeconds", 30)
            if grace_s < cell.get("drain_grace_s", 10.0) + DRAIN_MARGIN_S:
                found.append(
                    f"{name_of(manifest)}: {grace_s} s are too few to drain: raise the termination grace"
                )
        for group in (manifest.get("spec") or {}).get("workerGroupSpecs") or []:
            if str(cell.get("evaluators", 2)) != group["rayStartParams"].get("num-cpus"):
                found.append(f"{name_of(manifest)}: num-cpus must be the evaluators of settings/cell.toml")
    return found


__all__ = ["KUSTOMIZATIONS", "load", "name_of", "pod_problems", "problems", "settings", "templates"]
