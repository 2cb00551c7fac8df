"""When a certificate ends: the one field that operators must watch.

A walk over the DER of RFC 5280's Certificate down to its validity, on files of
our own; it checks nothing else, TLS does.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def not_after(pem: str) -> float:
    """End of the first certificate in `pem`, Unix time. Raises `ValueError` for anything else."""
    start, end = pem.find(_BEGIN), pem.find(_END)
    if not 0 <= start < end:
        raise ValueError("no certificate")
    der = ssl.PEM_cert_to_DER_cert(pem[start : end + len(_END)])
    try:
        _, certificate, _ = _element(der, _SEQUENCE)
        _, body, _ = _element(certificate, _SEQUENCE)
        if body[0] == _VERSION:
            _, _, body = _element(body)
        for _ in range(3):  # serial number, signature algorithm, issuer
            _, _, body = _element(body)
        _, validity, _ = _element(body, _SEQUENCE)
        _, _, rest = _element(validity)
        tag, text, _ = _element(rest)
    except IndexError as error:
        raise ValueError("a certificate that is cut short") from error
    return _time(tag, text.decode("ascii"))


def expiry(path: Path | None) -> Callable[[], float | None]:
    """A function for `watch_certificate`: reads the file anew each time; None when it cannot."""

    def read() -> float | None:
        if path is None:
            return None
        try:
            return not_after(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    return read


def _element(data: bytes, wanted: int | None = None) -> tuple[int, bytes, bytes]:
    """(tag, content, what follows) of the first element. Raises `ValueError`, `IndexError`."""
    tag, length, at = data[0], data[1], 2
    if wanted is not None and tag != wanted:
        raise ValueError("not a certificate")
    if length & 0x80:
        at = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:at], "big")
    if at + length > len(data):
        raise IndexError("cut short")
    return tag, data[at : at + length], data[at + length :]


def _time(tag: int, text: str) -> float:
    """RFC 5280, 4.1.2.5: two-digit years below 50 are of this century."""
    if tag == _UTC_TIME:
        text = ("20" if int(text[:2]) < 50 else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("a validity without a time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


__all__ = ["expiry", "not_after"]
