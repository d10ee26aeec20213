"""Ordinary clients: http.client, websockets, smtplib, grpcio.  `python -m lab.apps.client WHAT HOST
PORT ...` prints one line of JSON."""

import email.message
import hashlib
import http.client
import json
import resource
import smtplib
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Result = dict[str, Any]
BLOCK = bytes(range(256)) * 256


def get(host: str, port: int, secret: str) -> Result:
    """Three requests on one connection."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    answers = []
    for _ in range(3):
        connection.request("GET", "/", headers={"X-Secret": secret})
        response = connection.getresponse()
        answers.append((response.status, response.read().decode()))
    status, body = answers[-1]
    headers = {name.lower(): value for name, value in response.getheaders()}
    return {
        "status": status,
        "body": body[:500],
        "same": len(set(answers)) == 1,
        "proxy-status": headers.get("proxy-status", ""),
    }


def once(host: str, port: int) -> Result:
    """One request; failures are results too."""
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.request("GET", "/")
    response = connection.getresponse()
    return {
        "status": response.status,
        "body": response.read().decode()[:500],
        "proxy-status": response.getheader("proxy-status", ""),
    }


def download(host: str, port: int, size: str) -> Result:
    """A large chunked response."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    began = time.monotonic()
    connection.request("GET", f"/stream/{size}")
    response = connection.getresponse()
    total = 0
    while block := response.read(256 * 1024):
        total += len(block)
    return {"status": response.status, "bytes": total, "seconds": time.monotonic() - began}


def upload(host: str, port: int, size: str) -> Result:
    """A large chunked request."""
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        left = int(size)
        while left > 0:
            block = BLOCK[:left]
            digest.update(block)
            left -= len(block)
            yield block

    connection = http.client.HTTPConnection(host, port, timeout=30)
    began = time.monotonic()
    connection.request(
        "POST",
        "/sink",
        body=blocks(),
        encode_chunked=True,
        headers={"Transfer-Encoding": "chunked"},
    )
    response = connection.getresponse()
    answer = json.loads(response.read())
    right = answer == {"bytes": int(size), "sha256": digest.hexdigest()}
    return {"status": response.status, "right": right, "seconds": time.monotonic() - began}


def websocket(host: str, port: int, secret: str) -> Result:
    """Text messages back and forth, and a binary one of 1 MiB; uncompressed, so that only
    encryption can hide them.
    """
    from websockets.sync.client import connect  # noqa: PLC0415  # only this client needs it

    with connect(
        f"ws://{host}:{port}/", max_size=4 * 1024 * 1024, open_timeout=10, compression=None
    ) as connection:
        echoed = 0
        for number in range(50):
            text = f"{secret} {number}"
            connection.send(text)
            echoed += connection.recv(timeout=10) == text
        large = BLOCK * 16
        connection.send(large)
        return {"echoed": echoed, "large": connection.recv(timeout=10) == large}


def mail(host: str, port: int, secret: str) -> Result:
    """A message to a server that speaks first."""
    began = time.monotonic()
    with smtplib.SMTP(host, port, local_hostname="web", timeout=10) as connection:
        greeted = time.monotonic() - began
        message = email.message.EmailMessage()
        message["From"], message["To"], message["Subject"] = (
            "web@west.example",
            "shop@west.example",
            "an order",
        )
        message.set_content(secret)
        refused = connection.send_message(message)
    return {"refused": len(refused), "greeting_seconds": greeted}


def forged(host: str, port: int, server_name: str, certificate: str, key: str) -> Result:
    """TLS to the proxy itself, with a self-made certificate, and without verifying the peer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certificate, key)
    with (
        socket.create_connection((host, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=server_name) as stream,
    ):
        stream.sendall(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
        answer = stream.recv(4096).decode(errors="replace")
    words = answer.split(None, 2)
    return (
        {"status": int(words[1]), "body": answer}
        if len(words) > 1
        else {"error": "closed without an answer"}
    )


def latency(host: str, port: int, other_port: str, count: str) -> Result:
    """Requests on two kept-alive connections in turn; the microseconds of each."""
    ports = (port, int(other_port))
    connections = {each: http.client.HTTPConnection(host, each, timeout=10) for each in ports}
    times: dict[int, list[float]] = {each: [] for each in ports}
    for number in range(int(count) + 50):
        for each, connection in connections.items():
            began = time.perf_counter()
            connection.request("GET", "/")
            connection.getresponse().read()
            if number >= 50:  # the first ones open connections and warm caches
                times[each].append((time.perf_counter() - began) * 1e6)
    return {str(each): sorted(values) for each, values in times.items()}


CLIENTS: dict[str, Callable[..., Result]] = {
    "get": get, "once": once, "forged": forged, "download": download, "upload": upload,
    "websocket": websocket, "mail": mail, "latency": latency,
}  # fmt: skip


def find(what: str) -> Callable[..., Result]:
    """The client of this name."""
    if what.startswith("grpc-"):
        # only these clients need grpcio, which takes a while to load
        from lab.apps.grpc_client import CALLS  # noqa: PLC0415

        return CALLS[what]
    return CLIENTS[what]


def main() -> None:
    """Run one client; an error is a result too."""
    what, host, port, *rest = sys.argv[1:]
    try:
        result = find(what)(host, int(port), *rest)
    except (OSError, http.client.HTTPException, smtplib.SMTPException, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
