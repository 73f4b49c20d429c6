"""A stand-in for Google Cloud Storage over a local folder: the part of its JSON API that TensorStore uses.

Objects are files, ROOT/BUCKET/NAME. `packages/` holds a stand-in for gcsfs over the same folder.
"""

import contextlib
import http.server
import json
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

PACKAGES = pathlib.Path(__file__).with_name("packages")
_LOCK = threading.Lock()


@contextlib.contextmanager
def object_store(root: pathlib.Path) -> Iterator[dict[str, str]]:
    """Serve `root` within the block, and yield the variables that lead a process to it."""
    handler = type("Handler", (_Handler,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "OBJECT_STORE": str(root),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")])),
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    root: pathlib.Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query = self._asked()
        if path is None:
            self._list(query)
        elif not path.is_file():
            self._answer(404)
        elif not self._is_generation(path, query):
            self._answer(304)
        elif query.get("alt") == "media":
            self._send_content(path)
        else:
            self._send_json(self._about(path))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        bucket = urllib.parse.urlsplit(self.path).path.split("/b/")[1].split("/")[0]
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        path = self.root / bucket / query["name"]
        with _LOCK:
            if not self._is_generation(path, query):
                self._answer(412)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
            temporary.write_bytes(data)
            temporary.replace(path)
            self._send_json(self._about(path))

    def do_DELETE(self) -> None:
        path, query = self._asked()
        if path is None or not path.is_file():
            self._answer(404)
        elif not self._is_generation(path, query):
            self._answer(412)
        else:
            path.unlink()
            self._answer(204)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _asked(self) -> tuple[pathlib.Path | None, dict[str, str]]:
        """Return the object's file, or None for a list, and the query."""
        parts = urllib.parse.urlsplit(self.path)
        self.bucket, _, name = parts.path.split("/b/")[1].partition("/o/")
        self.bucket = self.bucket.removesuffix("/o")
        query = dict(urllib.parse.parse_qsl(parts.query))
        return (self.root / self.bucket / urllib.parse.unquote(name) if name else None), query

    def _is_generation(self, path: pathlib.Path, query: dict[str, str]) -> bool:
        """Return True if the object is the one that the query's conditions ask for."""
        now = str(path.stat().st_mtime_ns) if path.is_file() else "0"
        return query.get("ifGenerationMatch", now) == now and query.get("ifGenerationNotMatch") != now

    def _about(self, path: pathlib.Path) -> dict[str, str]:
        name = str(path.relative_to(self.root / path.relative_to(self.root).parts[0]))
        return {"name": name, "size": str(path.stat().st_size), "generation": str(path.stat().st_mtime_ns)}

    def _list(self, query: dict[str, str]) -> None:
        folder = self.root / self.bucket
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        wanted = [
            name
            for name in names
            if name.startswith(query.get("prefix", ""))
            and name >= query.get("startOffset", "")
            and not ("endOffset" in query and name >= query["endOffset"])
        ]
        self._send_json({"items": [self._about(folder / name) for name in wanted]})

    def _send_content(self, path: pathlib.Path) -> None:
        data, generation, status = path.read_bytes(), str(path.stat().st_mtime_ns), 200
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            begin = int(first) if first else len(data) - int(last)
            end = int(last) + 1 if first and last else len(data)
            self.extra = {"Content-Range": f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"}
            data, status = data[begin:end], 206
        self._answer(status, data, {"x-goog-generation": generation, **getattr(self, "extra", {})})

    def _send_json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
