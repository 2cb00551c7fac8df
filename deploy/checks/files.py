"""`python -m deploy.checks files`: container files, compose, Kubernetes manifests."""

from __future__ import annotations

from pathlib import Path

from deploy.checks import composition, dockerfile, manifests, rules

CONTAINERS = Path(__file__).resolve().parents[1] / "containers"


def main() -> int:
    """0 when nothing is wrong; prints what was looked at and what is wrong."""
    found: list[str] = []
    files = sorted(CONTAINERS.glob("*.Dockerfile"))
    for path in files:
        try:
            found += [f"{path.name}: {p}" for p in dockerfile.problems(dockerfile.read(path))]
        except ValueError as error:
            found.append(f"{path.name}: {error}")
    services = composition.load()
    found += [f"compose.yaml: {p}" for p in composition.problems(services)]
    objects = 0
    for folder in manifests.KUSTOMIZATIONS:
        try:
            loaded = manifests.load(folder)
        except ValueError as error:
            found.append(f"{folder.name}: {error}")
            continue
        objects += len(loaded)
        found += [f"{folder.name}: {p}" for p in manifests.problems(loaded)]
    found += rules.problems()
    for problem in found:
        print(problem)
    print(
        f"{len(files)} container files, {len(services['services'])} compose services, {objects} objects of "
        f"{len(manifests.KUSTOMIZATIONS)} kustomizations: {len(found)} problems"
    )
    return 1 if found else 0


__all__ = ["main"]
