"""A local stand-in for the parts of the hub's API that an upload takes, over HTTP on 127.0.0.1.

Written after the calls of huggingface_hub 2.4 (``HfApi.create_repo``, ``create_commit``, ``RepoCard.validate``) without
``hf_xet``: a repository is made, a card's metadata is checked, files are asked how they want to be uploaded, large ones
go by Git LFS and the rest in the commit. What is committed stays in memory, for a test to look at.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

TOKEN = "hf_fake"
READ_ONLY = "hf_read_only"
USER = "someone"


def metadata_errors(content: str) -> list[str]:
    """What the hub refuses in a card: the part of its rules that is published (hub-docs, modelcard.md)."""
    match = REGEX_YAML_BLOCK.search(content)
    data = yaml.safe_load(match[2]) if match else {}
    if not isinstance(data, dict):
        return ["metadata: expected a mapping"]
    errors = [
        f'"{name}" must be a string' for name in ("license", "library_name", "pipeline_tag") if not _is(data, name, str)
    ]
    for name in ("tags", "datasets", "metrics", "language", "base_model"):
        values = data.get(name, [])
        values = values if isinstance(values, list) else [values]
        errors += [f'"{name}" must hold strings' for value in values if not isinstance(value, str)]
        if name in ("base_model", "datasets"):
            errors += [f'"{name}" with value "{value}" is not valid' for value in values if not _is_id(value)]
    for model in data.get("model-index", []):
        if not _is(model, "name", str, required=True):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            task, dataset, metrics = (result.get(part) or {} for part in ("task", "dataset", "metrics"))
            if not _is(task, "type", str, required=True):
                errors.append('"model-index[].results[].task.type" is required')
            for name in ("type", "name"):
                if not _is(dataset, name, str, required=True):
                    errors.append(f'"model-index[].results[].dataset.{name}" is required')
            for name in ("config", "split"):
                if not _is(dataset, name, str):
                    errors.append(f'"model-index[].results[].dataset.{name}" must be a string')
            if not metrics:
                errors.append('"model-index[].results[].metrics" is required')
            for metric in metrics:
                if not _is(metric, "type", str, required=True):
                    errors.append('"model-index[].results[].metrics[].type" is required')
                if metric.get("value") is None:
                    errors.append('"model-index[].results[].metrics[].value" is required')
    return errors


def _is(data: dict[str, Any], name: str, kind: type, required: bool = False) -> bool:
    return isinstance(data[name], kind) if name in data else not required


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.startswith((".", "/")) and value.count("/") <= 1


@dataclass
class FakeHub:
    """What the server holds.

    Attributes:
        endpoint: Its address, for ``HF_ENDPOINT``.
        files: Committed files by repository and path.
        commits: Their messages.
        requests: Method and path of each request.
        die_at: Requests with this in their path get no answer: the connection ends.
    """

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    die_at: str | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status in (401, 403):
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(body)

    def _is_refused(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == TOKEN:
            return False
        if token == READ_ONLY:
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        else:
            self._answer({"error": "Invalid username or password."}, 401)
        return True

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        if self.hub.die_at is not None and self.hub.die_at in path:
            self.close_connection = True
            return
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            self._answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)
        elif self.command == "PUT" and parts[0] == "lfs-store":
            self.hub.large[hashlib.sha256(body).hexdigest()] = body
            self._answer({})
        elif path == "/api/repos/create":
            if not self._is_refused():
                asked = json.loads(body)
                repo = f"{asked['organization'] or USER}/{asked['name']}"
                self.hub.files.setdefault(repo, {})
                self._answer({"url": f"{self.hub.endpoint}/{repo}"})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [{**each, "actions": self._upload(each["oid"])} for each in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif parts[:2] == ["api", "models"] and f"{parts[2]}/{parts[3]}" in self.hub.files and len(parts) > 4:
            self._of_repo(f"{parts[2]}/{parts[3]}", parts[4], body)
        else:
            self._answer({"error": "Not found"}, 404)

    def _upload(self, oid: str) -> dict[str, Any]:
        return {"upload": {"href": f"{self.hub.endpoint}/lfs-store/{oid}", "header": {}}}

    def _of_repo(self, repo: str, what: str, body: bytes) -> None:
        if self._is_refused():
            return
        if what == "preupload":
            self._answer({"files": [self._mode(each["path"]) for each in json.loads(body)["files"]]})
        elif what == "commit":
            for line in body.splitlines():
                part = json.loads(line)
                key, value = part["key"], part["value"]
                if key == "header":
                    self.hub.commits.append(value["summary"])
                elif key == "file":
                    self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    self.hub.files[repo][value["path"]] = self.hub.large[value["oid"]]
            oid = f"{len(self.hub.commits):040x}"
            self._answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid})
        else:
            self._answer({"error": "Not found"}, 404)

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        is_large = path.endswith((".safetensors", ".bin"))
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}

    do_GET = do_POST = do_PUT = _handle  # noqa: N815


@contextmanager
def running_hub(die_at: str | None = None) -> Iterator[FakeHub]:
    """Run the server in the body.

    Args:
        die_at: See :class:`FakeHub`.
    """
    hub = FakeHub(die_at=die_at)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
