"""Which cell a tail uses: the candidates in their order, and a session at one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from blindtail.errors import ConfigError
from blindtail.rpc import INSECURE_LOOPBACK, Credentials, is_loopback, split_address
from edge.tail_client import CellClient

#: Cells that other cells have named and that are remembered.
MOST_LEARNED = 8
#: For how long a cell that said no for good (other model, no access) is passed over.
SHUN_S = 25.0


def split_addresses(cloud: str | Sequence[str]) -> tuple[str, ...]:
    """("a:1", "b:2") of "a:1, b:2" or of a list. Raises `ConfigError`."""
    parts = cloud.split(",") if isinstance(cloud, str) else cloud
    addresses = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for address in addresses:
        split_address(address)
    if not addresses:
        raise ConfigError("name at least one address of the cloud: host:port, or host:port,host:port")
    return addresses


def may_dial(credentials: Credentials, address: str) -> bool:
    """Whether the credentials for the given cells serve for another one as well."""
    try:
        host, _ = split_address(address)
    except ConfigError:
        return False
    return credentials != INSECURE_LOOPBACK or is_loopback(host)


class Cells:
    """The candidates: those of the settings first, then those that cells named, each once.

    dial       makes the client of one; raises `ConfigError`
    may_learn  whether a cell that another one named may be dialled
    """

    def __init__(
        self,
        addresses: Sequence[str],
        dial: Callable[[str], CellClient],
        may_learn: Callable[[str], bool] = lambda address: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given, self._learned = tuple(addresses), list[str]()
        self._may_learn, self._clock = may_learn, clock
        self._shunned: dict[str, float] = {}
        self.dial = dial

    def __len__(self) -> int:
        return len(self._given) + len(self._learned)

    def learn(self, others: Sequence[str]) -> None:
        """What a cell said of others; the latest word counts most."""
        new = [a for a in dict.fromkeys(others) if a not in self._given and self._may_learn(a)]
        self._learned = [*new, *(a for a in self._learned if a not in new)][:MOST_LEARNED]

    def shun(self, address: str) -> None:
        """It said no for good: others first, for a while."""
        self._shunned[address] = self._clock() + SHUN_S

    def order(self, after: str | None = None) -> list[str]:
        """Every candidate once: from the one behind `after` round to `after` itself, which comes last.

        Those that are shunned are left out, unless no other remains.
        """
        known = [*self._given, *self._learned]
        at = known.index(after) + 1 if after in known else 0
        turned = known[at:] + known[:at]
        now = self._clock()
        return [a for a in turned if self._shunned.get(a, 0.0) <= now] or turned


class Place:
    """A session at one cell, with its client.

    Requests hold it while they run; once it is left, the last of them closes the client.
    Take it, `hold` it and change it for another under one lock.
    """

    def __init__(self, candidate: str, client: CellClient) -> None:
        self.candidate, self.client = candidate, client
        self.session: bytes | None = None
        self.draining = False
        self._lock = threading.Lock()
        self._users = 0
        self._left = False

    def hold(self) -> None:
        with self._lock:
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._left and self._users == 0
        if last:
            self.client.close()

    def leave(self) -> None:
        """No new request comes; those that run are let finish."""
        with self._lock:
            last = self._users == 0 and not self._left
            self._left = True
        if last:
            self.client.close()


__all__ = ["MOST_LEARNED", "SHUN_S", "Cells", "Place", "may_dial", "split_addresses"]
