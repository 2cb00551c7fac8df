"""The development authority: what its certificates say, their files' modes, every mistake in one line."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from blindtail import cli
from blindtail.certs import create_authority, issue, show
from blindtail.errors import ConfigError
from blindtail.identity import Role
from blindtail.tls import ClientTlsFiles, TlsFiles

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    create_authority(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture(params=[0o022, 0o000, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    create_authority(tmp_path / "ca")
    files = issue(tmp_path / "ca", "camera-7", Role.EDGE)
    assert files.certificate.parent == tmp_path / "ca" / "camera-7"
    found = {p.name: mode(p) for p in (tmp_path / "ca").rglob("*")}
    assert found == {
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "camera-7": 0o700,
        "camera-7.key": 0o600,
        "camera-7.pem": 0o644,
    }
    assert mode(tmp_path / "ca") == 0o700
    assert files.ca.read_bytes() == (tmp_path / "ca" / "ca.pem").read_bytes()


@pytest.mark.parametrize("role", Role)
def test_a_leaf_says_who_it_is_and_can_sign_nothing(authority: Path, role: Role) -> None:
    files = issue(authority, "unit.1", role)
    certificate, ca = read(files.certificate), read(authority / "ca.pem")
    certificate.verify_directly_issued_by(ca)
    extensions = certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca) == (True, False)
    assert (usage.critical, usage.value.digital_signature, usage.value.key_cert_sign) == (True, True, False)
    purposes = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    server = role in (Role.CELL, Role.ORCHESTRATOR)
    assert (ExtendedKeyUsageOID.SERVER_AUTH in purposes, len(purposes)) == (server, 2 if server else 1)
    shown = show(files.certificate)
    assert (shown.identity, shown.role) == (f"{role.value}:unit.1", role.value)
    assert shown.hosts == (("localhost", "127.0.0.1") if server else ())
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert show(authority / "ca.pem").authority
    assert show(authority / "ca.pem").identity is None


def test_serials_and_keys_are_new_each_time(authority: Path) -> None:
    serials, keys = set(), set()
    for i in range(8):
        files = issue(authority, f"n{i}", Role.EDGE)
        serials.add(show(files.certificate).serial)
        keys.add(files.key.read_bytes())
    assert len(serials) == len(keys) == 8
    assert min(int(s, 16) for s in serials) > 2**100


def test_a_renewal_keeps_name_role_and_hosts(authority: Path) -> None:
    files = issue(authority, "cell-1", Role.CELL, hosts=["cell.example", "10.0.0.7", "::1"])
    before = show(files.certificate)
    old_key = files.key.read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        issue(authority, "cell-1", Role.CELL)
    assert files.key.read_bytes() == old_key
    assert issue(authority, "cell-1", Role.CELL, renew=True) == files
    after = show(files.certificate)
    assert after.hosts == before.hosts == ("cell.example", "10.0.0.7", "::1")
    assert after.serial != before.serial
    assert files.key.read_bytes() != old_key
    TlsFiles(files.certificate, files.key, files.ca).load(0.0)  # a pair
    with pytest.raises(ConfigError, match=r"is for cell:cell-1, not for orchestrator:cell-1"):
        issue(authority, "cell-1", Role.ORCHESTRATOR, renew=True)
    assert [p.name for p in files.key.parent.iterdir() if p.name.startswith(".")] == []  # nothing left over


def test_the_authority_is_never_overwritten(authority: Path) -> None:
    before = (authority / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        create_authority(authority)
    assert (authority / "ca.key").read_bytes() == before
    for name in ("ca", "ca.pem", "ca.key"):
        with pytest.raises(ConfigError, match="the authority's"):
            issue(authority, name, Role.EDGE, out=authority)
    issue(authority, "beside", Role.EDGE, out=authority)
    assert (authority / "ca.key").read_bytes() == before


def test_validity_is_bounded_by_the_authority(tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    create_authority(ca, days=10, now=NOW)
    files = issue(ca, "a", Role.EDGE, days=2, now=NOW)
    assert show(files.certificate).valid_until == NOW + datetime.timedelta(days=2)
    with pytest.raises(ConfigError, match="at most --days 10"):
        issue(ca, "b", Role.EDGE, days=11, now=NOW)
    with pytest.raises(ConfigError, match="expired on 2030-01-11"):
        issue(ca, "b", Role.EDGE, days=1, now=NOW + datetime.timedelta(days=10))
    for days in (0, -1, 1e9, float("nan")):
        with pytest.raises(ConfigError, match="days"):
            issue(ca, "b", Role.EDGE, days=days, now=NOW)


@pytest.mark.parametrize(
    "host", ["a:5", "1.2.3.400", "", "a b", "-a.example", "ü.example", "a..b", "x" * 64, "https://a"]
)
def test_wrong_hosts(authority: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="is not a host"):
        issue(authority, "c", Role.CELL, hosts=[host])
    assert not (authority / "c").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".x", "a b", "x" * 65, "ü", "a\n"])
def test_wrong_names(authority: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        issue(authority, name, Role.EDGE)


def test_an_edge_is_never_dialled(authority: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --host"):
        issue(authority, "e", Role.EDGE, hosts=["a.example"])


def test_a_damaged_authority_is_named(authority: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "other")
    files = issue(authority, "leaf", Role.EDGE)
    key = (authority / "ca.key").read_bytes()
    for path, content, words in (
        ("ca.key", (tmp_path / "other" / "ca.key").read_bytes(), "is not the key of"),
        ("ca.key", b"nonsense", "no private key"),
        ("ca.pem", b"nonsense", "no certificate"),
        ("ca.pem", files.certificate.read_bytes(), "is not the key of"),
    ):
        kept = (authority / path).read_bytes()
        (authority / path).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            issue(authority, "x", Role.EDGE)
        (authority / path).write_bytes(kept)
    (authority / "ca.key").write_bytes(files.key.read_bytes())
    (authority / "ca.pem").write_bytes(files.certificate.read_bytes())
    with pytest.raises(ConfigError, match="not the certificate of an authority"):
        issue(authority, "x", Role.EDGE)
    (authority / "ca.key").write_bytes(key)
    (authority / "ca.key").chmod(0o644)
    (authority / "ca.pem").write_bytes(files.ca.read_bytes())
    with pytest.raises(ConfigError, match="chmod 600"):
        issue(authority, "x", Role.EDGE)
    (authority / "ca.key").chmod(0o600)
    issue(authority, "x", Role.EDGE)  # positive control


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["certs", *arguments])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca, out = tmp_path / "ca", tmp_path / "device"
    printed = []

    def good(*arguments: object) -> str:
        code, text, err = run(capsys, *map(str, arguments))
        assert (code, err) == (0, ""), err
        printed.append(text)
        return text

    good("init", ca)
    text = good("issue", ca, "cell-1", "--role", "cell", "--host", "cell.example", "--host", "::1")
    assert "cell:cell-1 on cell.example, ::1" in text
    made = json.loads(good("issue", ca, "camera-7", "--role", "edge", "--out", out, "--json"))
    assert made["identity"] == "edge:camera-7"
    assert sorted(p.name for p in out.iterdir()) == ["ca.pem", "camera-7.key", "camera-7.pem"]
    ClientTlsFiles(Path(made["ca"]), Path(made["certificate"]), Path(made["key"])).load(0.0)
    text = good("show", out / "camera-7.pem")
    assert "edge:camera-7" in text
    assert "days left" in text
    shown = json.loads(good("show", ca / "cell-1" / "cell-1.pem", "--json"))
    assert (shown["hosts"], shown["role"], shown["expired"]) == (["cell.example", "::1"], "cell", False)
    good("issue", ca, "camera-7", "--role", "edge", "--out", out, "--force")
    assert "PRIVATE" not in "".join(printed)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = tmp_path / "ca"
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    create_authority(ca, now=yesterday)
    (tmp_path / "file").write_text("")
    old = issue(ca, "old", Role.EDGE, days=0.5, now=yesterday)
    for arguments, words in (
        (("init", ca), "not empty"),
        (("init", tmp_path / "file"), "cannot make"),
        (("init", tmp_path / "file" / "below"), "cannot make"),
        (("issue", ca, "a", "--role", "edg"), "roles: edge, cell, orchestrator, operator"),
        (("issue", tmp_path / "nowhere", "a", "--role", "edge"), "certs init"),
        (("issue", ca, "a/b", "--role", "edge"), "cannot be a name"),
        (("issue", ca, "old", "--role", "edge"), "--force"),
        (("show", tmp_path / "nowhere"), "No such file"),
        (("show", ca / "ca.key"), "no certificate"),
        (("show", ca), "cannot read"),
    ):
        code, out, err = run(capsys, *map(str, arguments))
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert words in err
        assert "PRIVATE" not in err
    assert "EXPIRED" in run(capsys, "show", str(old.certificate))[1]
