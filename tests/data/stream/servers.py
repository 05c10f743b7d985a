"""A web server of files in memory that answers ranges, fails when told to, and can pass for the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Server:
    """``files`` by path; ``fail`` is asked before each answer and gives a status to answer with instead, or 0."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.address, self.etags = files, "", True
        self.requests: list[str] = []
        self.failures: list[int] = []

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """(status, content, more headers) of a path without its query."""
        if path not in self.files:
            return 404, b"not found", {}
        data = self.files[path]
        return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'} if self.etags else {}


class Hub(Server):
    """A hub with one data set ``owner/name`` whose repository holds ``files``."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """The few calls that listing and reading a data set take."""
        api, repo = "/api/datasets/owner/name", "/datasets/owner/name/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{self.commit}"):
            return self._json({"id": "owner/name", "sha": self.commit, "siblings": [], "private": False, "tags": []})
        if path.startswith(f"{api}/revision/"):
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
        if path.startswith(f"{api}/tree/{self.commit}"):
            return self._json(self._tree(path.removeprefix(f"{api}/tree/{self.commit}").strip("/")))
        if path.startswith(repo + self.commit + "/"):
            return super().answer(path.removeprefix(repo + self.commit + "/"))
        return 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}

    def _tree(self, below: str) -> list[dict[str, Any]]:
        """Files and folders of a folder, those of its folders too: what the client asks for with ``recursive=true``."""
        inside = {name: data for name, data in self.files.items() if name.startswith(f"{below}/" if below else "")}
        folders = {"/".join(name.split("/")[:n]) for name in inside for n in range(1, name.count("/") + 1)} - {below}
        return [{"type": "directory", "oid": "d" * 40, "size": 0, "path": folder} for folder in sorted(folders)] + [
            {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
            for name, data in inside.items()
        ]

    @staticmethod
    def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server at ``server.address`` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            server.requests.append(f"{self.command} {path}")
            status, data, headers = server.answer(path)
            failure = server.failures.pop(0) if server.failures and self.command == "GET" and "/api/" not in path else 0
            if failure:
                status, data, headers = failure, b"failing", {}
            wanted = self.headers.get("Range")
            if status == 200 and wanted is not None:
                first, last = wanted.removeprefix("bytes=").split("-")
                begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
                status, data = 206, data[begin : end + 1]
            self.send_response(status)
            for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
