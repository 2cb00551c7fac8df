"""Runs one command in a root directory of its own. Standard library only; started by `roots.py`.

Its one argument is JSON: root, read_only, mounts [[source, target, writable]],
tmpfs [[target, size, mode]], loopback, uid, gid, cwd, env, argv. It runs in new
mount and process namespaces, so that mounts and processes are gone when it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_IFF_UP, _GET_FLAGS, _SET_FLAGS = 1, 0x8913, 0x8914


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def bind(source: Path, target: Path, writable: bool) -> None:
    mount("--rbind", str(source), str(target))
    if not writable:
        mount("-o", "remount,bind,ro", str(target))


def loopback_up() -> None:
    with socket.socket() as any_socket:
        name = struct.pack("16sh", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _GET_FLAGS, name), 16)
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))


def enter(plan: dict[str, Any]) -> None:
    root = Path(plan["root"])
    mount("--make-rprivate", "/")
    bind(root, root, True)
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("-t", "tmpfs", "-o", "mode=0755", "dev", str(root / "dev"))
    for name in _DEVICES:
        (root / "dev" / name).touch()
        bind(Path("/dev") / name, root / "dev" / name, True)
    (root / "dev" / "shm").mkdir()
    (root / "dev" / "fd").symlink_to("/proc/self/fd")
    for target, size, mode in plan["tmpfs"]:
        mount("-t", "tmpfs", "-o", f"size={size},mode={mode}", "tmpfs", f"{root}{target}")
    for source, target, writable in plan["mounts"]:
        place, inner = Path(source), Path(f"{root}{target}")
        if not inner.exists():
            if place.is_dir():
                inner.mkdir(parents=True)
            else:
                inner.parent.mkdir(parents=True, exist_ok=True)
                inner.touch()
        bind(place, inner, writable)
    if plan["read_only"]:  # what is mounted below stays as it is
        mount("-o", "remount,bind,ro", str(root))
    if plan["loopback"]:
        loopback_up()
    os.chroot(root)
    os.chdir(plan["cwd"])
    os.setgroups([])
    os.setgid(plan["gid"])
    os.setuid(plan["uid"])
    os.umask(0o022)
    os.execvpe(plan["argv"][0], plan["argv"], plan["env"])


if __name__ == "__main__":
    enter(json.loads(sys.argv[1]))
