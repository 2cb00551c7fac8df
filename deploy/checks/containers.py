"""What the container files make, started as they say: `python -m deploy.checks containers`."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.checks import manifests
from deploy.checks.roots import REPOSITORY, Build, Builder, Root, StepFailed, size_mb, temporary, why_not

FILES = REPOSITORY / "deploy" / "containers"
SETTINGS = REPOSITORY / "deploy" / "kubernetes" / "base" / "settings"
CACHE = REPOSITORY / ".tools" / "roots"
ZOO = "blindtail/models/zoo/fashion"
#: Programs that must not be in an image, and modules that must not be importable in any.
_NO_PROGRAMS = (
    *("gcc", "cc", "g++", "c++", "ld", "make", "cmake", "ninja"),
    *("pip", "pip3", "git", "curl", "wget"),
)
_NO_MODULES = ("torch", "pip", "pytest", "setuptools", "cmake", "ninja", "nanobind", "scikit_build_core")

_SERVE = """
set -u
"$@" >/tmp/out 2>/tmp/err &
server=$!
tries=0
until {health} >/tmp/health 2>&1; do
    tries=$((tries + 1))
    if [ $tries -ge 120 ] || ! kill -0 $server 2>/dev/null; then
        cat /tmp/health /tmp/out /tmp/err >&2
        exit 90
    fi
    sleep 0.5
done
cat /tmp/health
kill -TERM $server
wait $server
echo "SIGTERM: exit code $?"
echo "processes left:" $(cat /proc/[0-9]*/comm 2>/dev/null | grep -vxE 'sh|cat|grep')
"""


@dataclass(frozen=True)
class Case:
    """One container file and what is tried with what it makes."""

    name: str
    file: str
    modules: tuple[str, ...]  # that it must have
    without: tuple[str, ...]  # that it must not have
    extras: str = ""
    role: str = ""  # it serves, with a certificate of this role
    settings: str = ""

    def build(self) -> Build:
        arguments = {"EXTRAS": self.extras} if self.extras else {}
        return Build(FILES / f"{self.file}.Dockerfile", arguments)


CASES = (
    Case(
        "orchestrator",
        "orchestrator",
        ("grpc", "cryptography"),
        ("ray",),
        "",
        "orchestrator",
        "orchestrator.toml",
    ),
    Case("edge", "edge", ("onnxruntime", "tenseal"), ("ray", "cryptography")),
    Case("edge, as a site", "edge", ("onnxruntime", "ray"), ("cryptography",), "cluster"),
    Case("cloud", "cloud", ("ray", "tenseal"), ("cryptography",), "", "cell", "cell.toml"),
)


def main(names: Sequence[str] = ()) -> int:
    """0 when everything went well, or when this machine cannot make roots, which is said."""
    print("No image is built here: each container file's install steps run in a clean root directory")
    print("made by debootstrap, and what they leave is started there as the file says.")
    start_s = time.monotonic()
    CACHE.mkdir(parents=True, exist_ok=True)
    failed = []
    cases = [case for case in CASES if not names or case.file in names]
    with temporary() as folder:
        work = Path(folder)
        if reason := why_not(work):
            print(f"\n*** SKIPPED, NOTHING WAS CHECKED: {reason} ***\n")
            return 0
        builds = [case.build() for case in cases]
        builder = Builder(work, CACHE, builds, lambda text: print(text, flush=True))
        authority = _authority(work)
        try:
            builder.base()
            for case in cases:
                print(f"{case.name} ({case.file}.Dockerfile)", flush=True)
                try:
                    _check(case, builder, authority)
                except (StepFailed, ValueError) as error:
                    print(f"  FAILED: {error}", flush=True)
                    failed.append(case.name)
        except StepFailed as error:
            print(f"FAILED: {error}")
            failed.append("base")
    which = f": {', '.join(failed)}" if failed else ""
    print(f"{len(failed)} failed{which}; {time.monotonic() - start_s:.0f} s")
    return 1 if failed else 0


def _check(case: Case, builder: Builder, authority: Path) -> None:
    root = builder.build(case.build())
    try:
        parts = (size_mb(root.folder), size_mb(root.folder / "opt" / "blindtail"))
        print(f"  size: {parts[0]:.0f} MB in all, of which {parts[1]:.0f} MB are the virtual environment")
        _contents(case, root)
        volume = _volume(builder.work, root)
        # What a service manager would mount: its volume alone may be written.
        mounts = [(str(volume), "/var/lib/blindtail", True)]
        if case.role:
            _serve(case, root, mounts, builder.work, authority)
        elif "ray" not in case.modules:
            _infer(root, mounts)
        else:
            _site(root, mounts)
    finally:
        shutil.rmtree(root.folder, ignore_errors=True)


def _contents(case: Case, root: Root) -> None:
    identity = root.run(["id", "-u"]).strip()
    version = root.run(["blindtail", "--version"]).strip()
    root.run([*root.entry, "--help"])
    modules = [*case.modules, *case.without, *_NO_MODULES]
    found = set(
        root.run(
            [
                *("python", "-c"),
                "import importlib.util, sys\n"
                "print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m)])",
                *modules,
            ]
        ).split()
    )
    wrong = found.symmetric_difference(case.modules)
    if identity == "0" or wrong:
        raise StepFailed(
            f"user {identity}; modules that are there or missing against the rules: {sorted(wrong)}"
        )
    root.run(["python", "-c", "import blindtail.he._native"])
    there = root.run(
        ["sh", "-c", f"for p in {' '.join(_NO_PROGRAMS)}; do command -v $p || true; done"]
    ).split()
    writable = root.run(
        ["sh", "-c", "find /opt /usr /etc -xdev -writable ! -type l -print 2>/dev/null | head -3"]
    )
    if there or writable.strip():
        raise StepFailed(
            f"programs that have no place here: {there}; writable for the user: {writable.split()}"
        )
    print(f"  {version} as user {identity}, root read-only; native code; no compiler, no pip, no torch")


def _volume(work: Path, root: Root) -> Path:
    volume = work / f"volume-{root.folder.name}"
    volume.mkdir(mode=0o700)
    os.chown(volume, root.uid, root.gid)
    return volume


def _authority(work: Path) -> Path:
    folder = work / "authority"
    _blindtail("certs", "init", str(folder))
    return folder


def _blindtail(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "blindtail", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise StepFailed(f"blindtail {' '.join(arguments)}: {done.stderr.strip()}")


def _serve(case: Case, root: Root, mounts: list[tuple[str, str, bool]], work: Path, authority: Path) -> None:
    """The image's own command and HEALTHCHECK over mutual TLS, then SIGTERM."""
    made = work / f"made-{case.file}"
    _blindtail("certs", "issue", str(authority), case.file, "--role", case.role, "--out", str(made))
    etc = work / f"etc-{case.file}"
    (etc / "tls").mkdir(parents=True)
    for name, source in (
        ("tls.crt", f"{case.file}.pem"),
        ("tls.key", f"{case.file}.key"),
        ("ca.crt", "ca.pem"),
    ):
        shutil.copyfile(made / source, etc / "tls" / name)
        os.chown(etc / "tls" / name, 0, root.gid)
        (etc / "tls" / name).chmod(0o440)
    text = (SETTINGS / case.settings).read_text(encoding="utf-8")
    # No other host is there to be reached, and one evaluator will do.
    kept = [line for line in text.splitlines() if not line.startswith("orchestrator =")]
    (etc / case.settings).write_text("\n".join(kept).replace("evaluators = 2", "evaluators = 1"))
    etc.chmod(0o755)
    mounts = [*mounts, (str(etc), "/etc/blindtail", False), (str(REPOSITORY / ZOO), "/models", False)]
    lines = _run_server(root, [*root.entry, *root.command], root.health, mounts)
    if "processes left:" not in lines:
        raise StepFailed(f"it did not end cleanly: {lines}")
    print(f"  {' '.join(root.command)}: {'; '.join(lines[:2])}; no process left")
    if case.file == "cloud":
        _as_a_pod(root, mounts)


def _run_server(
    root: Root,
    command: list[str],
    health: list[str],
    mounts: list[tuple[str, str, bool]],
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """What was said: the probe's yes, the exit code after SIGTERM, what was left. Raises `StepFailed`."""
    probe = shlex.join(health)
    said = root.run(
        ["sh", "-c", _SERVE.replace("{health}", probe), "sh", *command],
        mounts=mounts,
        tmpfs=[("/dev/shm", "1g", "1777")],
        environment=environment,
        timeout_s=150,
    )
    found = [line.strip() for line in said.splitlines()]
    # Ray's own commands say more than their answer.
    lines = [x for x in found if " is serving" in x or x.startswith(("SIGTERM", "processes left"))]
    if "SIGTERM: exit code 0" not in lines:
        raise StepFailed("it did not end cleanly:\n" + said)
    return lines


def _as_a_pod(root: Root, mounts: list[tuple[str, str, bool]]) -> None:
    """The RayCluster's worker command and both probes, with a head in the place of a worker's Ray node."""
    (cluster,) = [m for m in manifests.load(manifests.KUSTOMIZATIONS[0]) if m["kind"] == "RayCluster"]
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (container,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    environment |= {
        # What KubeRay adds to a pod.
        "KUBERAY_GEN_RAY_START_CMD": "ray start --head --port=6379 --num-cpus=2 --include-dashboard=false "
        "--object-store-memory=200000000 --block",
        "RAY_ADDRESS": "127.0.0.1:6379",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "POD_IP": "127.0.0.1",
    }
    command = [*container["command"], *container["args"]]
    probes = [shlex.join(c["readinessProbe"]["exec"]["command"]) for c in (head, container)]
    lines = _run_server(root, command, ["sh", "-c", " && ".join(probes)], mounts, environment)
    print(f"  as a pod of the RayCluster, on a Ray node of its own: {'; '.join(lines[:2])}")


def _infer(root: Root, mounts: list[tuple[str, str, bool]]) -> None:
    mounts = [*mounts, (str(REPOSITORY / ZOO), "/models", False)]
    said = root.run(
        [*root.entry, "infer", "/models/edge.bt", "fashion:0", "--json"], mounts=mounts, timeout_s=60
    )
    answer = json.loads(said)
    if answer["route"] == "tail" or not isinstance(answer["predicted"], int):
        raise StepFailed(f"an answer of an exit was expected, not {answer}")
    print(f"  infer /models/edge.bt fashion:0: {answer['class_name']} from {answer['route']}, on exits alone")


def _site(root: Root, mounts: list[tuple[str, str, bool]]) -> None:
    mounts = [*mounts, (str(REPOSITORY / ZOO), "/models", False)]
    out = "/var/lib/blindtail/answers.jsonl"
    command = ["edge", "/models/edge.bt", "--images", "20", "--out", out]
    root.run([*root.entry, *command], mounts=mounts, tmpfs=[("/dev/shm", "1g", "1777")], timeout_s=120)
    answers = Path(mounts[0][0], "answers.jsonl").read_text().splitlines()
    if len(answers) != 20:
        raise StepFailed(f"{len(answers)} answers of 20")
    print(f"  {' '.join(command)}: {len(answers)} answers, on exits alone")


__all__ = ["CASES", "Case", "main"]
