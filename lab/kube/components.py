"""The programs of a node: their command lines and their files. Pure, but for `write`.

In the order in which they start. etcd does not sync to the disk: nothing outlives the cluster.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lab.kube.network import DNS, PODS4, PODS6, SERVICES4, SERVICES6, Addresses

ETCD = "http://127.0.0.1:2379"
ETCD_PEERS = "http://127.0.0.1:2380"
CONTAINERD = "/run/containerd/containerd.sock"
CNI = "/etc/cni/net.d"
CNI_PLUGINS = "/usr/lib/cni"  # where Debian has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a node.

    `state` is its directory, `programs` that of the binaries, `logs` that of the logs, `cgroup` its
    cgroup from the root of each hierarchy. The flags are added to those of the components.
    """

    name: str
    state: Path
    programs: Path
    logs: Path
    cgroup: str
    apiserver: tuple[str, ...] = ()
    controllers: tuple[str, ...] = ()
    proxy_mode: str = "nftables"

    @property
    def pki(self) -> Path:
        """The directory of certificates and kubeconfigs."""
        return self.state / "pki"


def commands(own: Settings) -> dict[str, list[str]]:
    """The command of each component, by its name."""
    programs = {
        "etcd": _etcd(own),
        "containerd": [
            "containerd",
            "--config",
            str(own.state / "containerd.toml"),
            "--log-level",
            "warn",
        ],
        "kube-apiserver": _apiserver(own),
        "kube-controller-manager": _controllers(own),
        "kube-scheduler": [
            "kube-scheduler",
            "--kubeconfig",
            str(own.pki / "kube-scheduler.conf"),
            "--leader-elect=false",
        ],
        "kubelet": _kubelet(own),
        "kube-proxy": ["kube-proxy", "--config", str(own.state / "kube-proxy.json")],
    }
    found = {
        name: [str(own.programs / name) if (own.programs / name).exists() else name, *rest]
        for name, (_, *rest) in programs.items()
    }
    # A kubelet that does not find containerd waits for seconds, and then ends.
    found["kubelet"] = [
        "sh",
        "-c",
        'until [ -S "$0" ]; do sleep 0.1; done; exec "$@"',
        CONTAINERD,
        *found["kubelet"],
    ]
    return found


def _etcd(own: Settings) -> list[str]:
    listen = ["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]
    peers = [
        "--listen-peer-urls",
        ETCD_PEERS,
        "--initial-advertise-peer-urls",
        ETCD_PEERS,
        "--initial-cluster",
        f"{own.name}={ETCD_PEERS}",
    ]
    return [
        "etcd",
        "--name",
        own.name,
        "--data-dir",
        str(own.state / "etcd"),
        *listen,
        *peers,
        "--unsafe-no-fsync",
        "--log-level",
        "warn",
    ]


def _apiserver(own: Settings) -> list[str]:
    pki = own.pki
    flags = {
        "etcd-servers": ETCD,
        "advertise-address": Addresses.of(own.name).node,
        "secure-port": 6443,
        "service-cluster-ip-range": f"{SERVICES4},{SERVICES6}",
        "allow-privileged": "true",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "client-ca-file": pki / "ca.crt",
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "kubelet-certificate-authority": pki / "ca.crt",
        "kubelet-client-certificate": pki / "apiserver-kubelet.crt",
        "kubelet-client-key": pki / "apiserver-kubelet.key",
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": pki / "sa.pub",
        "service-account-signing-key-file": pki / "sa.key",
        "requestheader-client-ca-file": pki / "front.crt",
        "requestheader-allowed-names": "front-proxy",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "proxy-client-cert-file": pki / "front-proxy.crt",
        "proxy-client-key-file": pki / "front-proxy.key",
    }
    return [
        "kube-apiserver",
        *(f"--{flag}={value}" for flag, value in flags.items()),
        *own.apiserver,
    ]


def _controllers(own: Settings) -> list[str]:
    pki = own.pki
    flags = {
        "kubeconfig": pki / "kube-controller-manager.conf",
        "leader-elect": "false",
        "use-service-account-credentials": "true",
        "service-account-private-key-file": pki / "sa.key",
        "root-ca-file": pki / "ca.crt",
        "cluster-signing-cert-file": pki / "ca.crt",
        "cluster-signing-key-file": pki / "ca.key",
        "allocate-node-cidrs": "true",
        "cluster-cidr": f"{PODS4},{PODS6}",
        "node-cidr-mask-size-ipv4": 24,
        "node-cidr-mask-size-ipv6": 64,
        "service-cluster-ip-range": f"{SERVICES4},{SERVICES6}",
    }
    return [
        "kube-controller-manager",
        *(f"--{flag}={value}" for flag, value in flags.items()),
        *own.controllers,
    ]


def _kubelet(own: Settings) -> list[str]:
    addresses = Addresses.of(own.name)
    labels = f"topology.kubernetes.io/zone={own.name}-a,topology.kubernetes.io/region={own.name}"
    where = [
        "--config",
        str(own.state / "kubelet.json"),
        "--kubeconfig",
        str(own.pki / "kubelet.conf"),
    ]
    return [
        "kubelet",
        *where,
        "--hostname-override",
        own.name,
        "--node-ip",
        f"{addresses.node},{addresses.node6}",
        "--node-labels",
        labels,
    ]


def write(own: Settings) -> None:
    """The configuration files, into the state directory, and the CNI's where containerd reads
    it."""
    (own.state / "containerd.toml").write_text(_CONTAINERD)
    (own.state / "kubelet.json").write_text(json.dumps(_kubelet_file(own)))
    (own.state / "kube-proxy.json").write_text(json.dumps(_proxy_file(own)))
    (own.state / "resolv.conf").write_text("")
    Path(CNI).mkdir(parents=True, exist_ok=True)
    Path(CNI, "10-routed.conflist").write_text(json.dumps(_CNI))


def _kubelet_file(own: Settings) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(own.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(own.pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(own.pki / "kubelet.key"),
        "cgroupDriver": "cgroupfs",
        # Kubelets that share a part of the hierarchy take each other's pods for leftovers.
        "cgroupRoot": own.cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(own.state / "resolv.conf"),
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    }


def _proxy_file(own: Settings) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": own.proxy_mode,
        "clientConnection": {"kubeconfig": str(own.pki / "kube-proxy.conf")},
        "clusterCIDR": f"{PODS4},{PODS6}",
        "hostnameOverride": own.name,
        # Zero leaves the settings of the machine alone.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


# Pods are routed rather than bridged. Bridged ones on one node answer each other past the packet
# filter, so that a Service's address works only where the kernel has br_netfilter.
_CNI = {
    "cniVersion": "1.0.0",
    "name": "routed",
    "plugins": [
        {
            "type": "ptp",
            "ipMasq": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": PODS4}], [{"subnet": PODS6}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
# restrict_oom_score_adj: a root without CAP_SYS_RESOURCE cannot put a process before others for the
# kernel's memory killer.
_CONTAINERD = f"""version = 2
root = '/var/lib/containerd'
state = '/run/containerd'
[grpc]
  address = '{CONTAINERD}'
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = 'pause:1'
  restrict_oom_score_adj = true
[plugins.'io.containerd.grpc.v1.cri'.cni]
  bin_dir = '{CNI_PLUGINS}'
  conf_dir = '{CNI}'
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]
    SystemdCgroup = false
"""
