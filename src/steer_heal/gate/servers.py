"""Servers on the loopback that are good or bad endpoints, for the checks."""

import json
import ssl
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TLS = cache(ssl.create_default_context)  # most of the time of an ask over loopback, which has none


def send(handler, text: str, status: int = 200, kind: str = "application/json") -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def body(handler) -> bytes:
    """What was sent: of a length that is said, or in chunks."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers["Content-Length"]))
    parts = []
    while size := int(handler.rfile.readline(), 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(parts)


@contextmanager
def serving(endpoint, port: int = 0):
    """The URL of a server that answers by `endpoint.reply(handler, body)`; `endpoint.closed` is set at its end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            endpoint.reply(self, {})

        def do_POST(self):
            sent = body(self)
            is_json = "ndjson" not in self.headers.get("Content-Type", "") and self.command == "POST"
            endpoint.reply(self, json.loads(sent) if is_json else sent)

        do_HEAD, do_PUT = do_GET, do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that went away
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        endpoint.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


def hang(endpoint, handler):
    endpoint.closed.wait(20)


def drip(endpoint, handler):
    handler.send_response(200)
    handler.end_headers()
    while not endpoint.closed.wait(0.1):
        handler.wfile.write(b" ")


def flood(endpoint, handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * 100_000)


def says(text, status=200, kind="application/json"):
    return lambda endpoint, handler: send(handler, text, status, kind)


def headed(**headers):
    """A body that is not what its headers say."""

    def reply(endpoint, handler):
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(b'{"data": []}')

    return reply


HTML = says("<!doctype html>\n<h1>It \x1b[2J works</h1>", kind="text/html")
