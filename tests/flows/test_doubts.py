"""A connection to an endpoint fails while there is none to the control plane: the endpoints may be
old, so the proxy connects to the control plane soon."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from proxy.directory.channel.source import ControlSource
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, mirror, outbound_port
from tests.kit.channel import CONTROL
from tests.kit.clusters import LISTEN, ask
from tests.kit.http import connect
from tests.kit.ports import free_port


@pytest.mark.parametrize("answers", [True, False])
async def test_a_failed_connection_is_a_doubt(tmp_path: Path, answers: bool) -> None:
    fleet = Fleet(tmp_path)
    async with application(mirror) as port:
        to = port if answers else free_port()
        file = fleet.configure("west", outbound={**LISTEN, "fixed_destination": f"{HOST}:{to}"})
        document = json.loads(file.read_text())
        where = {"address": f"{HOST}:{free_port()}", "identity": str(CONTROL)}
        document["directory"] = {"control": {**where, "min_pause": "1h", "max_pause": "1h"}}
        file.write_text(json.dumps(document))
        async with fleet.running_from(file) as west:
            client = await connect(Address(HOST, outbound_port(west)))
            answer = await ask(client, "app")
            assert answer.status == (200 if answers else 502)
            source = west.source
            assert isinstance(source, ControlSource)
            assert (source._pauses._may_hurry == -math.inf) is answers
