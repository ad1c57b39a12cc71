"""A local certificate authority and a server certificate, so that the first request already runs over TLS.

The CA lives in the data folder for ten years; the server certificate is renewed at start when it has less than thirty
days left or does not name the configured host. Production hands in its own certificate instead (docs/operations.md).
Private keys never leave their folder; the CA's public certificate is what clients are told to trust.
"""

import datetime as dt
import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3_650
LEAF_DAYS = 397  # the longest that browsers accept
RENEW_DAYS = 30


class TlsError(Exception):
    """The configured certificate cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    ca: Path  # what a client must trust
    certificate: Path
    key: Path


def own_certificate(certificate: str, key: str) -> TlsFiles:
    """The operator's certificate and key. Raises TlsError if they cannot be read or do not belong together."""
    files = TlsFiles(Path(certificate), Path(certificate), Path(key))
    try:
        server_context(files)
    except OSError as error:  # ssl.SSLError is one
        raise TlsError(
            f"BULKHEAD_TLS_CERTIFICATE={certificate} and BULKHEAD_TLS_KEY={key} cannot be used together: {error}"
        ) from error
    return files


def ensure_certificates(folder: Path, host: str, now_ns: int) -> TlsFiles:
    """Create or renew the local CA and the certificate for localhost, loopback and `host` (PEM, P-256, PKCS#8)."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = TlsFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    now = dt.datetime.fromtimestamp(now_ns // 10**9, dt.UTC)
    ca_key_path = folder / "ca-key.pem"
    if not (files.ca.exists() and ca_key_path.exists()):
        ca_key = ec.generate_private_key(ec.SECP256R1())
        _write_private(ca_key_path, ca_key)
        _write(files.ca, _build_ca(ca_key, now))
        files.certificate.unlink(missing_ok=True)
    if not _still_good(files, host, now):
        ca_key = _read_private(ca_key_path)
        ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        _write_private(files.key, key)
        _write(files.certificate, _build_leaf(ca, ca_key, key, host, now))
    return files


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 and newer with the library's own safe defaults."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    return context


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    try:
        own: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        own = x509.DNSName(host)
    return names if own in names else [*names, own]


def _build_ca(key: ec.EllipticCurvePrivateKey, now: dt.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bulkhead local CA")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _build_leaf(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    host: str,
    now: dt.datetime,
) -> x509.Certificate:
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bulkhead gateway")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=LEAF_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _still_good(files: TlsFiles, host: str, now: dt.datetime) -> bool:
    if not (files.certificate.exists() and files.key.exists()):
        return False
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    fresh = certificate.not_valid_after_utc - now > dt.timedelta(days=RENEW_DAYS)
    return fresh and all(name in list(names) for name in _names(host))


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{path} holds a {type(key).__name__}, expected a P-256 key")
    return key


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def _write(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
