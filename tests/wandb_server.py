"""A stand-in for W&B's server: as much of its protocol as it takes to be sent runs and artifacts, kept in memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """What was sent: requests counts everything; runs: id -> the fields of its bucket; history: id -> its rows;
    artifacts: (collection, type, digest) -> id; used: (run, artifact id)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[str]] = {}
        self.artifacts: dict[tuple[str, str, str], str] = {}
        self.used: set[tuple[str, str]] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history[run]]

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL operation gets."""
        project = {"id": "p", "name": given.get("project", ""), "entity": {"id": "e", "name": "me"}}
        if name == "RunResumeStatus":
            run = self.runs.get(given["name"])
            lines = self.history.get(given["name"], [])
            bucket = run and {
                "id": given["name"], "name": given["name"], "displayName": run["displayName"], "config": run["config"],
                "summaryMetrics": lines[-1] if lines else "{}", "historyTail": json.dumps(lines[-1:]),
                "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
                "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {**project, "bucket": bucket}}
        if name == "UpsertBucket":
            known = self.runs.setdefault(given["name"], {"displayName": None, "config": "{}"})
            known |= {key: value for key, value in given.items() if value is not None}
            bucket = {"id": given["name"], "name": given["name"], "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**bucket, **{key: known[key] for key in ("displayName", "config")}}}}
        if name == "CreateArtifact":
            sent = given["input"]
            key = (sent["artifactCollectionName"], sent["artifactTypeName"], sent["digest"])
            found = self.artifacts.setdefault(key, f"artifact-{len(self.artifacts)}")
            latest = {"latestArtifact": {"id": found}}
            return {"createArtifact": {"artifact": {"id": found, "state": "COMMITTED", "artifactSequence": latest}}}
        if name == "UseArtifact":
            sent = given.get("input", given)
            self.used.add((sent["runName"], sent["artifactID"]))
            return {"useArtifact": {"artifact": {"id": sent["artifactID"]}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *words: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            sent = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
            answer = {"data": self.server.answer(operation[1] if operation else "", sent.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            part = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if part:
                self.server.history.setdefault(self.path.split("/")[4], [])[part["offset"] :] = part["content"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST

    def do_GET(self) -> None:
        self.headers["Content-Length"] = self.headers["Content-Length"] or "0"
        self.do_POST()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on this machine while the block runs."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
