"""CoreDNS is built with the plugins that its configuration names, and no others."""

import re

import yaml

from lab.kube.places import HERE


def test_coredns_has_the_plugins_of_its_configuration() -> None:
    documents = yaml.safe_load_all((HERE / "manifests" / "coredns.yaml").read_text())
    corefile = next(one["data"]["Corefile"] for one in documents if one["kind"] == "ConfigMap")
    named = set(re.findall(r"^ {4}(\w+)", corefile, re.MULTILINE))
    imported = re.findall(
        r"coredns/plugin/(\w+)", (HERE / "go" / "coredns" / "main.go").read_text()
    )
    assert set(imported) == named == {"errors", "kubernetes", "loadbalance", "ready"}
