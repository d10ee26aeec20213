"""The table of addresses and the answers change together, with the directory and with time."""

from __future__ import annotations

import dns.message
import dns.rcode

from proxy.config.resolv_conf import Resolvers
from proxy.config.schema import Config
from proxy.config.schema_clusters import DnsConfig
from proxy.dns.answers import Reply
from proxy.dns.service import DnsService
from proxy.dns.virtual_addresses import RemoteName
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.telemetry.metrics import Metrics
from tests.dns.documents import document
from tests.kit.http import until

ONE, TWO = RemoteName("east", "default", "one"), RemoteName("east", "default", "two")


def names(metrics: Metrics, **settings: float) -> DnsService:
    config = Config(dns=DnsConfig(ttl=1.0, **settings))  # type: ignore[arg-type]
    return DnsService(config, Resolvers((Address("127.0.0.1", 1),), ()), Dialer(), metrics)


def ask(asked: DnsService, name: str) -> dns.message.Message:
    reply = asked.resolver.answers.answer(dns.message.make_query(name, "A").to_wire())
    assert isinstance(reply, Reply)
    return dns.message.from_wire(reply.wire)


def test_a_new_directory_changes_answers_and_addresses_in_one_step() -> None:
    asked = names(Metrics())
    asked.publish(document(remote=(ONE,)))
    host = ask(asked, "one.east").answer[0][0].to_text()
    assert asked.virtual.lookup(host) == ONE
    asked.publish(document(remote=(TWO,)))
    assert ask(asked, "one.east").rcode() == dns.rcode.NXDOMAIN
    assert asked.virtual.lookup(host) == ONE
    assert ask(asked, "two.east").answer


async def test_a_name_without_a_free_address_gets_one_when_a_quarantine_ends() -> None:
    metrics = Metrics()
    asked = names(metrics, max_names=1, quarantine=1.0)
    asked.publish(document(remote=(ONE,)))
    asked.publish(document(remote=(TWO,)))
    assert ask(asked, "two.east").rcode() == dns.rcode.SERVFAIL
    asked.observe()
    assert b'isthmus_virtual_addresses{state="quarantined"} 1.0' in metrics.render()

    def found() -> bool:
        asked.sweep()
        return bool(ask(asked, "two.east").answer)

    await until(found, 15)
    asked.observe()
    assert b'isthmus_virtual_addresses{state="quarantined"} 0.0' in metrics.render()
