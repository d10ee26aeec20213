"""A server that accepts work and does not do it: it reads the first bytes and then nothing.  `stall
PORT`

To an HTTP/2 client it sends SETTINGS, acknowledges those of the client, and discards what comes. It
never opens a window. To any other client it says nothing and stops reading. A connection ends when
the client ends it.
"""

import asyncio
import resource
import sys

SETTINGS, SETTINGS_ACK = (
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\x00\x00\x00\x04\x01\x00\x00\x00\x00",
)


async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection."""
    try:
        if (await reader.read(3)) == b"PRI":
            writer.write(SETTINGS + SETTINGS_ACK)
            while await reader.read(65536):
                pass
        else:
            await asyncio.sleep(3600)
    except OSError:
        pass
    finally:
        writer.close()


async def main() -> None:
    """Serve until the process ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = await asyncio.start_server(stall, None, int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
