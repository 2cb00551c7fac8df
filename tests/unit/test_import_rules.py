"""The import rules, checked three ways: by reading every import, by blocking modules, by import-linter.

`make check` runs import-linter over the whole graph (indirect imports included). Here,
every import statement of every file is read, those inside functions too, and each role is
imported in a fresh process in which what it must not need cannot be imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("blindtail", "edge", "cloud", "orchestrator")
ROLES = ("edge", "cloud", "orchestrator")


def _within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def breaks(file: str, module: str) -> str | None:
    """The rule that `file` (relative path) breaks by importing `module`, or None."""
    role, name = file.split("/")[0], file.rsplit("/", 1)[-1]
    if role == "blindtail" and _within(module, *ROLES):
        return "the core knows no role"
    policy = role == "edge" and _within(module, "orchestrator.policy")
    if role in ROLES and _within(module, *(set(ROLES) - {role})) and not policy:
        return "roles never import each other"
    if file == "orchestrator/policy.py" and not _within(
        module, "blindtail.records", *sys.stdlib_module_names
    ):
        return "policies import the standard library and the records only"
    if role in ("cloud", "orchestrator") and _within(module, "blindtail.he.secret"):
        return "the trust boundary"
    if _within(module, "ray") and not (role in ROLES and name in ("actor.py", "app.py")):
        return "ray only in actor.py and app.py"
    if _within(module, "torch", "torchvision"):
        allowed = file.startswith(("blindtail/models/", "blindtail/train/")) or file in (
            "blindtail/he/frontend.py",
            "blindtail/he/bases.py",
            "blindtail/he/probes.py",
        )
        return None if allowed else "torch only in models, train and the front end"
    if _within(module, "tenseal") and not file.startswith("blindtail/he/"):
        return "tenseal only in blindtail/he"
    if _within(module, "blindtail.pb") and not file.startswith("blindtail/pb/"):
        allowed = file.startswith("blindtail/wire/") or file == "blindtail/rpc.py" or name == "servicer.py"
        if not (allowed or name.endswith("_client.py")):
            return "generated code only in wire, rpc, servicers and clients"
    if role in PACKAGES and _within(module, "bench", "tests"):
        return "what ships never imports bench or tests"
    if _within(module, "pickle", "cloudpickle", "dill", "marshal", "shelve"):
        return "no pickle anywhere"
    return None


def imports(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at any depth; `from a import b` gives a and a.b."""
    parts = Path(file).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            loads = ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            if loads and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(source: str, file: str) -> list[str]:
    return [
        f"{file}:{line} imports {module}: {rule}"
        for line, module in imports(ast.parse(source), file)
        if (rule := breaks(file, module))
    ]


def test_no_file_breaks_a_rule() -> None:
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    assert len(files) > 30
    found = [v for p in files for v in violations(p.read_text(), p.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


PLANTED = [
    ("blindtail/x.py", "import edge"),
    ("blindtail/x.py", "from cloud import gateway"),
    ("edge/x.py", "from cloud.gateway import Gateway"),
    ("edge/x.py", "import orchestrator.service"),
    ("cloud/x.py", "import orchestrator.policy"),
    ("cloud/x.py", "def f():\n    from blindtail.he import secret"),
    ("orchestrator/x.py", "from blindtail.he.secret import SecretKey"),
    ("cloud/x.py", "import importlib\nimportlib.import_module('blindtail.he.secret')"),
    ("orchestrator/policy.py", "import numpy"),
    ("orchestrator/policy.py", "from blindtail.bundle import EdgeBundle"),
    ("edge/runtime.py", "import ray"),
    ("blindtail/app.py", "import ray"),
    ("edge/executor.py", "import torch.nn"),
    ("blindtail/he/program.py", "import torch"),
    ("edge/cipher.py", "import tenseal"),
    ("edge/session.py", "from blindtail.pb import tail_pb2"),
    ("edge/session.py", "from blindtail import pb"),
    ("edge/sub/x.py", "from .. import x\nfrom ..x import pickle\nimport pickle"),
    ("cloud/x.py", "from tests.e2e import leakscan"),
]


@pytest.mark.parametrize(("file", "source"), PLANTED, ids=[f"{f}: {s.splitlines()[-1]}" for f, s in PLANTED])
def test_planted_violations_are_found(file: str, source: str) -> None:
    assert violations(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("edge/runtime.py", "from orchestrator.policy import Policy"),
        ("edge/actor.py", "import ray"),
        ("cloud/servicer.py", "from blindtail.pb import tail_pb2_grpc"),
        ("edge/tail_client.py", "from blindtail.pb import tail_pb2"),
        ("orchestrator/policy.py", "import math\nfrom blindtail.records import Action"),
        ("blindtail/he/sealio.py", "def f():\n    import tenseal"),
        ("edge/cipher.py", "from blindtail.he.secret import SecretKey"),
    ],
)
def test_what_is_allowed_is_not_reported(file: str, source: str) -> None:
    assert not violations(source, file)


_BLOCK = """
import importlib, sys
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in blocked):
            raise ImportError("blocked: " + name)
        return None
sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""


def _import_with_blocked(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    code = _BLOCK.format(blocked=blocked, modules=modules)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def _modules(package: str, *leave_out: str) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__") and not _within(name, *leave_out):
            found.append(name)
    return found


BLOCKED_BY_ROLE = [
    # Anything of the edge works without the cloud's code, training, and (outside actor and app) Ray.
    (
        "edge",
        ["cloud", "torch", "onnx", "sklearn", "matplotlib", "ray", "tenseal"],
        ["edge.actor", "edge.app"],
    ),
    ("edge", ["cloud", "torch", "onnx"], []),
    # The cloud has no way to the secret key, the edge or training.
    ("cloud", ["edge", "orchestrator", "torch", "onnx", "onnxruntime", "blindtail.he.secret", "tenseal"], []),
    ("cloud", ["ray", "edge", "orchestrator", "torch"], ["cloud.actor", "cloud.app"]),
    ("orchestrator", ["edge", "cloud", "ray", "torch", "tenseal", "numpy", "blindtail.he"], []),
    # The core without training needs no torch; without the cryptographic library, all but its use works.
    (
        "blindtail",
        ["edge", "cloud", "orchestrator", "ray", "torch", "tenseal"],
        [
            "blindtail.models",
            "blindtail.train",
            *(f"blindtail.he.{n}" for n in ("frontend", "bases", "probes")),
        ],
    ),
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("package", "blocked", "leave_out"),
    BLOCKED_BY_ROLE,
    ids=[f"{r[0]}-{i}" for i, r in enumerate(BLOCKED_BY_ROLE)],
)
def test_each_role_imports_with_modules_blocked(
    package: str, blocked: list[str], leave_out: list[str]
) -> None:
    modules = _modules(package, *leave_out)
    assert modules
    done = _import_with_blocked(modules, blocked)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_blocker_blocks() -> None:
    assert _import_with_blocked(["blindtail.he.frontend"], ["torch"]).returncode != 0
    assert _import_with_blocked(["edge.runtime"], ["orchestrator.policy"]).returncode != 0


def test_import_blindtail_he_loads_no_library() -> None:
    code = (
        "import sys, blindtail.he, blindtail; "
        "sys.exit(bool({'tenseal', 'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
