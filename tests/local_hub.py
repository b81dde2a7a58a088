"""A server on this machine that answers what huggingface_hub's client asks of the hub.

It holds one repository, in memory, with one commit after another on one branch. Which answers
the client needs is written in the hub's API; large files go into the commit too, since it is the
server that says which do.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class LocalHub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repo_id = ""
        self.made: dict[str, object] = {}
        self.messages: list[str] = []
        self.files: dict[str, bytes] = {}
        self.commit = "0" * 40


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Answers(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        match urlsplit(self.path).path.split("/")[1:]:
            case ["api", "repos", "create"]:
                hub.made = json.loads(body)
                hub.repo_id = f"{hub.made['organization']}/{hub.made['name']}"
                self._answer({"url": f"{hub.url}/{hub.repo_id}"})
            case ["api", "models", _, _, "preupload", "main"]:
                rules = {"uploadMode": "regular", "shouldIgnore": False}
                files = [{"path": one["path"], **rules} for one in json.loads(body)["files"]]
                self._answer({"files": files})
            case ["api", "models", _, _, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        hub.messages.append(line["value"]["summary"])
                    else:
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[line["value"]["path"]] = content
                hub.commit = hashlib.sha1(body).hexdigest()
                url = f"{hub.url}/{hub.repo_id}/commit/{hub.commit}"
                self._answer({"success": True, "commitOid": hub.commit, "commitUrl": url})
            case _:
                self._refuse()

    def do_GET(self) -> None:
        hub = self.server
        match unquote(urlsplit(self.path).path).split("/")[1:]:
            case ["api", "models", user, name, "revision", "main"] if self._has(user, name):
                self._answer({"id": hub.repo_id, "sha": hub.commit})
            case ["api", "models", user, name, "tree", hub.commit] if self._has(user, name):
                self._answer(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                        for path, data in hub.files.items()
                    ]
                )
            case [user, name, "resolve", "main" | hub.commit, *path] if self._has(user, name):
                data = hub.files.get("/".join(path))
                self._refuse("EntryNotFound") if data is None else self._send(data)
            case _:
                self._refuse()

    do_HEAD = do_GET  # noqa: N815 - the server's name for it

    def log_message(self, *_: object) -> None:
        pass

    def _has(self, user: str, name: str) -> bool:
        return f"{user}/{name}" == self.server.repo_id

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, value: object) -> None:
        self._send(json.dumps(value).encode(), kind="application/json")

    def _send(self, data: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, reason: str = "RepoNotFound") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
