"""An SMTP server (package aiosmtpd): a protocol in which the server speaks first.  Writes each
message it takes to its output."""

import asyncio
import sys

from aiosmtpd.smtp import SMTP, Envelope, Session


class Mailbox:
    """Takes every message."""

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: ARG002, N802  # aiosmtpd's names
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        print(f"message for {', '.join(envelope.rcpt_tos)}: {len(content)} bytes", flush=True)
        return "250 taken"


async def main(port: int) -> None:
    """Serve forever, on all addresses of both families."""
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(Mailbox(), hostname="shop"), None, port
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
