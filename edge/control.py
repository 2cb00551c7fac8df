"""The edge's end of the control plane: policies come, are tried, and take effect; counts go.

A policy that an orchestrator hands down is tried on synthetic inputs before any
image meets it. One that this model or this release cannot follow is refused with
the reason, and the one before stays in force. The last good one is kept in the
state directory: a restarted edge follows it also while the orchestrator is away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtail.attach import Attachment
from blindtail.bundle import EdgeBundle
from blindtail.errors import BlindtailError, ConfigError
from blindtail.machine import release
from blindtail.policy_document import PolicyDocument
from blindtail.rpc import Credentials
from blindtail.wire.checks import TEXT_CHARS
from blindtail.wire.control import INSTANCE_BYTES, Hello, PeerKind, PolicyAck, PolicyUpdate, Report
from edge.trial import policy_for
from orchestrator.policy import Policy

_log = logging.getLogger(__name__)

#: After its welcome the orchestrator sends the policy in force at once; this long it may take.
_SETTLE_S = 0.3
_FORMAT = 1
#: A stored policy is smaller.
_FILE_BYTES = 100_000


@dataclass(frozen=True)
class Rules:
    """What a request goes by, from its start to its end.

    deadline_s  for requests that bring none of their own, seconds; None = none
    version     the orchestrator's number for it; 0 = the edge's own
    """

    policy: Policy
    deadline_s: float | None
    version: int = 0


class PolicyControl:
    """One runtime's attachment to an orchestrator.

    own     rules without any orchestrator: an objective that it does not set stays as here
    use     called with the rules in force from now on, on a thread of the attachment
    report  seconds since it was last asked -> the sums since then
    heard   called when a policy has come, with whether it was applied

    Several runtimes of one device may share `state_dir`, and then the stored policy.
    """

    def __init__(
        self,
        bundle: EdgeBundle,
        own: Rules,
        use: Callable[[Rules], None],
        report: Callable[[float], Report | None],
        state_dir: Path,
        heard: Callable[[bool], None] | None = None,
    ) -> None:
        self._bundle, self._own, self._use, self._report = bundle, own, use, report
        self._heard = heard or (lambda applied: None)
        self._file = PolicyFile(state_dir, bundle.model)
        self._instance = os.urandom(INSTANCE_BYTES)
        self._in_force: PolicyUpdate | None = None
        self._came = threading.Event()
        self._attachment: Attachment | None = None

    def start(self, address: str, credentials: Credentials) -> None:
        """Takes up the stored policy, then begins to dial. Raises `ConfigError` for a wrong address."""
        attachment = Attachment(address, credentials, self.hello, self._report, self.receive)
        self.restore()
        self._attachment = attachment
        attachment.start()

    @property
    def version(self) -> int:
        """Of the policy in force; 0 = the edge's own."""
        return 0 if self._in_force is None else self._in_force.version

    @property
    def state(self) -> str:
        """ "attached" or "away"."""
        return "attached" if self._attachment is not None and self._attachment.connected else "away"

    def wait_attached(self, timeout_s: float) -> bool:
        """Waits until the orchestrator is there and its policy is in force; False when it is not in time."""
        end_s = time.monotonic() + timeout_s
        if self._attachment is None or not self._attachment.wait_connected(timeout_s):
            return False
        # Nothing comes when the policy in force is the right one already.
        self._came.wait(min(_SETTLE_S, max(0.0, end_s - time.monotonic())))
        return True

    def close(self) -> None:
        if self._attachment is not None:
            self._attachment.close()

    # -- called by the attachment --------------------------------------------------

    def hello(self) -> Hello:
        model = (self._bundle.model, self._bundle.version)
        return Hello(PeerKind.EDGE, self._instance, release(), (model,), self.version)

    def receive(self, update: PolicyUpdate) -> PolicyAck:
        """Applies a policy or says why not. Never raises."""
        try:
            self._apply(update)
        except BlindtailError as error:
            _log.warning("policy version %d is refused: %s", update.version, error)
            self._heard(False)
            return PolicyAck(update.version, False, str(error)[:TEXT_CHARS])
        finally:
            self._came.set()
        self._heard(True)
        try:
            self._file.write(update)
        except OSError as error:
            _log.warning("the policy in force cannot be stored: %s", error)
        return PolicyAck(update.version, True)

    def restore(self) -> None:
        """Takes up the policy that was in force last; a damaged file is removed."""
        try:
            update = self._file.read()
            if update is not None:
                self._apply(update)
        except BlindtailError as error:
            _log.warning("the stored policy is not used and removed: %s", error)
            self._file.remove()

    def _apply(self, update: PolicyUpdate) -> None:
        """Raises `ConfigError`; the rules in force are then what they were."""
        if update.model not in ("", self._bundle.model):
            raise ConfigError(f"this edge runs model {self._bundle.model}, not {update.model}")
        document = PolicyDocument.decode(update.document)
        policy = policy_for(self._bundle, document.policy, document.parameters)
        deadline_s = document.objectives.deadline_s
        if deadline_s is None:
            deadline_s = self._own.deadline_s
        self._use(Rules(policy, deadline_s, update.version))
        self._in_force = update
        _log.info("policy version %d is in force: %s", update.version, policy.name)


class PolicyFile:
    """The last good policy of one model, for the next start. Only its owner may read it."""

    def __init__(self, state_dir: Path, model: str) -> None:
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model)
        name = model if plain else hashlib.sha256(model.encode()).hexdigest()[:32]
        self._model = model
        self.path = state_dir / f"policy-{name}.json"

    def write(self, update: PolicyUpdate) -> None:
        """Whole or not at all. Raises `OSError`."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "model": self._model,
            "version": update.version,
            "for": update.model,
            "document": json.loads(update.document),
        }
        content["sha256"] = _digest(content)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def read(self) -> PolicyUpdate | None:
        """None when there is none. Raises `ConfigError` for a damaged file."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        try:
            content = json.loads(data) if len(data) <= _FILE_BYTES else None
            if not isinstance(content, dict) or content.pop("sha256") != _digest(content):
                raise ValueError
            if content["format"] != _FORMAT or content["model"] != self._model:
                raise ValueError
            document = json.dumps(content["document"]).encode()
            return PolicyUpdate(int(content["version"]), str(content["for"]), document)
        except (ValueError, KeyError, TypeError, RecursionError, BlindtailError) as error:
            raise ConfigError(f"{self.path} is damaged") from error

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove %s: %s", self.path, error.strerror)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
