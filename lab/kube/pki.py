"""The certificates of a cluster, and the kubeconfigs of its programs:
https://kubernetes.io/docs/setup/best-practices/certificates/."""

import base64
import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.kube.network import API, Addresses

_LIFETIME = datetime.timedelta(days=30)
_EARLIER = datetime.timedelta(minutes=5)
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Authority:
    """A certificate authority; `certificate` is its own, in PEM. Everything goes into `folder`, as
    NAME.crt and NAME.key."""

    def __init__(self, folder: Path, file: str, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        built = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.certificate = built.public_bytes(serialization.Encoding.PEM)
        _write(folder, file, self.certificate, self._key)

    def issue(
        self, file: str, name: str, organization: str | None = None, names: tuple[str, ...] = ()
    ) -> None:
        """A certificate for client and server. `names` are DNS names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if organization is not None:
            attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        builder = _builder(x509.Name(attributes), self._name, key).add_extension(
            _usage("digital_signature"), critical=True
        )
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(one) for one in names]), critical=False
            )
        built = builder.sign(self._key, hashes.SHA256())
        _write(self._folder, file, built.public_bytes(serialization.Encoding.PEM), key)


def _builder(subject: x509.Name, issuer: x509.Name, key: Key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(
            subject_name=subject,
            issuer_name=issuer,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
        )
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + _LIFETIME)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(
        **{one: one in allowed for one in _USAGES}, encipher_only=False, decipher_only=False
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(folder: Path, file: str, certificate: bytes | None, key: Key) -> None:
    if certificate is not None:
        (folder / f"{file}.crt").write_bytes(certificate)
    target = folder / f"{file}.key"
    target.touch(mode=0o600)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    target.write_bytes(text)


def write(folder: Path, cluster: str) -> None:
    """All certificates, keys and kubeconfigs of a cluster, into an empty directory."""
    own = Addresses.of(cluster)
    ca, front = Authority(folder, "ca", "kubernetes"), Authority(folder, "front", "front-proxy-ca")
    inside = "kubernetes.default.svc.cluster.local"
    names = tuple(".".join(inside.split(".")[:count]) for count in (1, 2, 3, 5))
    ca.issue(
        "apiserver",
        "kube-apiserver",
        names=(*names, "localhost", "127.0.0.1", own.node, own.node6, own.wan, API),
    )
    ca.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
    front.issue("front-proxy", "front-proxy")
    ca.issue("admin", "admin", "system:masters")
    for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        ca.issue(name, f"system:{name}")
    ca.issue("kubelet", f"system:node:{cluster}", "system:nodes", (cluster, own.node, own.node6))
    signing = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _write(folder, "sa", None, signing)
    public = signing.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "sa.pub").write_bytes(public)
    for user in ("admin", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"):
        target = folder / f"{user}.conf"
        target.touch(mode=0o600)
        target.write_text(_kubeconfig(folder, cluster, own.node, user))


def _kubeconfig(folder: Path, cluster: str, address: str, user: str) -> str:
    def data(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    authority = {"server": f"https://{address}:6443", "certificate-authority-data": data("ca.crt")}
    client = {
        "client-certificate-data": data(f"{user}.crt"),
        "client-key-data": data(f"{user}.key"),
    }
    whole = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": cluster,
        "clusters": [{"name": cluster, "cluster": authority}],
        "users": [{"name": user, "user": client}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
    }
    return json.dumps(whole)
