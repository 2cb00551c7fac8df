"""Composition: one started tail in the cloud for every cut of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError
from blindtail.he.spec import TailSpec
from blindtail.records import TailTimings
from blindtail.rpc import Credentials, secure_channel
from edge.activity import Activity
from edge.cells import Cells, may_dial, split_addresses
from edge.cipher import check_backend, largest_reply, open_cipher, prepare_backend
from edge.keyfiles import KeyFiles, default_state_dir
from edge.keys import KeyProcess
from edge.keys_child import Order, credentials_to_json
from edge.session import RemoteTail
from edge.tail import Tail
from edge.tail_client import CellClient, GrpcTailClient
from edge.tickets import MOST_TICKETS

#: An upload without a byte of progress is given up after this long; sooner when there is another cell.
GIVE_UP_S, GIVE_UP_ONE_OF_MANY_S = 60.0, 10.0


def open_tails(
    bundle: EdgeBundle,
    address: str | Sequence[str],
    *,
    credentials: Credentials,
    state_dir: str | Path | None = None,
    uplink_bps: float | None = None,
    backend: str = "seal",
    on_probe: Callable[[int, float, TailTimings], None] | None = None,
    on_upload: Callable[[float], None] | None = None,
    tickets: int = 0,
    activity: Activity | None = None,
) -> dict[int, Tail]:
    """One started `RemoteTail` per cut of the model. Raises `ConfigError`.

    address  "host:port", or several with commas between them: the first is preferred
    tickets  most that each tail holds, made while `activity` is quiet; 0 = none
    """
    if not 0 <= tickets <= MOST_TICKETS:
        raise ConfigError(f"tickets must be from 0 to {MOST_TICKETS}, not {tickets}")
    check_backend(backend)
    addresses = split_addresses(address)
    for one in addresses:
        secure_channel(one, credentials).close()  # refuses what no later dial could do
    if uplink_bps is not None and not uplink_bps > 0:
        raise ConfigError(f"uplink_bps is the uplink's bits per second, above 0, not {uplink_bps!r}")
    root = Path(state_dir) if state_dir is not None else default_state_dir()
    tails: dict[int, Tail] = {}
    try:
        for cut, spec in bundle.cuts.items():
            following = bundle.segments(cut)[1:]
            KeyFiles(root, spec, backend).prepare()
            prepare_backend(spec, backend)
            cells = Cells(
                addresses, _dialler(bundle, cut, credentials, backend), partial(may_dial, credentials)
            )
            patience_s = GIVE_UP_S if len(addresses) == 1 else GIVE_UP_ONE_OF_MANY_S
            tail = RemoteTail(
                spec,
                cells,
                KeyFiles(root, spec, backend),
                KeyProcess(_orders(spec, root, backend, credentials, uplink_bps, patience_s)),
                backend=backend,
                on_probe=None if on_probe is None else partial(on_probe, cut),
                on_upload=on_upload,
                tickets=tickets,
                activity=activity,
                load_cipher=partial(open_cipher, following=following),
                following=following,
            )
            tails[cut] = tail
            tail.start()
    except BaseException:
        for opened in tails.values():
            opened.close()
        raise
    return tails


def _dialler(
    bundle: EdgeBundle, cut: int, credentials: Credentials, backend: str
) -> Callable[[str], CellClient]:
    spec, largest = bundle.cuts[cut], max(largest_reply(s, backend) for s in bundle.segments(cut))

    def dial(address: str) -> CellClient:
        return GrpcTailClient(
            address,
            credentials,
            model=bundle.model,
            version=bundle.version,
            spec=spec,
            reply_bytes=largest,
        )

    return dial


def _orders(
    spec: TailSpec,
    root: Path,
    backend: str,
    credentials: Credentials,
    uplink_bps: float | None,
    give_up_s: float,
) -> Callable[[str | None], Order]:
    def order(address: str | None) -> Order:
        return Order(
            spec=spec.to_json(),
            state_dir=str(root),
            backend=backend,
            address=address,
            credentials=credentials_to_json(credentials),
            uplink_bps=uplink_bps,
            give_up_s=give_up_s,
        )

    return order
