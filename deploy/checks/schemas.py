"""Manifests against schemas, every unknown field refused.

Kubernetes' own kinds: the schemas of the package kubernetes-validate. Custom
kinds: ours in deploy/schemas, which list the documented fields that we use, and
nothing else; pod templates inside them go through Kubernetes' schema again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
#: The oldest release that the manifests are meant for, and the newest that the package knows.
VERSIONS = ("1.30", "1.37")
CUSTOM = {
    ("ray.io/v1", "RayCluster"): "raycluster.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring.json",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "monitoring.json",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring.json",
}


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """What the schemas say against one manifest."""
    key = (str(manifest.get("apiVersion")), str(manifest.get("kind")))
    if key not in CUSTOM:
        return list(_built_in(json.dumps(manifest, sort_keys=True, default=str)))
    found = _own(manifest, CUSTOM[key])
    for template in ray_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        found += _built_in(json.dumps(pod, sort_keys=True, default=str))
    return found


def ray_templates(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayCluster, the head's first; [] for every other kind."""
    if manifest.get("kind") != "RayCluster":
        return []
    spec = manifest.get("spec") or {}
    groups = [spec.get("headGroupSpec") or {}, *(spec.get("workerGroupSpecs") or [])]
    return [group["template"] for group in groups if isinstance(group.get("template"), dict)]


@functools.lru_cache(maxsize=1000)  # the package reads its schemas anew for each manifest: 30 ms
def _built_in(text: str) -> tuple[str, ...]:
    """What Kubernetes' schemas say against a manifest, as JSON."""
    manifest, found = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(str(part) for part in error.path)
            found.append(f"Kubernetes {version}: {where}: {error.message[:300]}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"there is no schema for it: {error.message}")
    return tuple(found)


@functools.cache
def _validator(name: str) -> Any:
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def _own(manifest: Mapping[str, Any], name: str) -> list[str]:
    return [
        f"{'.'.join(str(part) for part in error.path)}: {error.message[:300]}"
        for error in _validator(name).iter_errors(manifest)
    ]


__all__ = ["CUSTOM", "VERSIONS", "problems", "ray_templates"]
