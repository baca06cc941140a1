"""A stand-in for the Hub on this machine: the few requests of its HTTP interface that reading and pushing a model take."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Hub:
    """What the stand-in holds, and what it was asked."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes that were sent
    fail_uploads: int = 0  # how many uploads of large files fail from now on
    commits: int = 0

    def sent(self) -> int:
        """Bytes of files that went out."""
        return sum(size for _, _, size in self.asked)

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to take this for the Hub, and nothing else."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
        return {**os.environ, **own, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(self, cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command line against it, in a process of its own because the Hub's client reads its address when imported."""
        command = [sys.executable, "-m", "compress", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(cache), check=False)


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve until the end of the block."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            state.asked.append((self.command, self.path, len(content) if self.command != "HEAD" else 0))

        def json(self, value: Any, code: int = 200) -> None:
            self.answer(code, json.dumps(value).encode(), Content_Type="application/json")

        def file(self, found: re.Match[str]) -> None:
            content = state.files.get(found["repo"], {}).get(found["file"])
            if content is None:
                kind = "EntryNotFound" if found["repo"] in state.files else "RepoNotFound"
                self.answer(404, X_Error_Code=kind, X_Repo_Commit="c" * 40)
                return
            common = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": "c" * 40, "Accept_Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                common["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                self.answer(206, content[first : last + 1], **common)
            elif self.command == "HEAD":
                self.answer(200, b"", Content_Length=str(len(content)), **common)
            else:
                self.answer(200, content, **common)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", path):
                self.file(found)
            elif path == "/api/whoami-v2":
                self.json({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
            elif found := re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?", path):
                known = state.files.get(found["repo"])
                if known is None:
                    self.answer(404, X_Error_Code="RepoNotFound")
                else:
                    siblings = [{"rfilename": name} for name in known]
                    self.json(
                        {"id": found["repo"], "sha": "c" * 40, "siblings": siblings, "private": state.private[found["repo"]]}
                    )
            elif found := re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/.+", path):
                self.json([])
            else:
                self.answer(404)

        def do_POST(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            if path == "/api/repos/create":
                values = json.loads(body)
                repo = f"{values.get('organization') or 'me'}/{values['name']}"
                if repo in state.files:
                    self.json({"url": f"{state.address}/{repo}", "error": "exists"}, 409)
                    return
                state.files[repo], state.private[repo] = {}, bool(values.get("private")) or values.get("visibility") == "private"
                self.json({"url": f"{state.address}/{repo}", "id": repo})
            elif path == "/api/validate-yaml":
                self.json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
                self.json({"files": modes})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = []
                for wanted in json.loads(body)["objects"]:
                    entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
                    if wanted["oid"] not in state.stored:
                        entry["actions"] = {"upload": {"href": f"{state.address}/lfs/{wanted['oid']}", "header": {}}}
                    objects.append(entry)
                self.json({"transfer": "basic", "objects": objects})
            elif found := re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+", path):
                repo = state.files[found["repo"]]
                for line in body.splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        repo[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                    elif item["key"] == "lfsFile":
                        repo[item["value"]["path"]] = state.stored[item["value"]["oid"]]
                state.commits += 1
                oid = f"{state.commits:040x}"
                self.json({"commitUrl": f"{state.address}/{found['repo']}/commit/{oid}", "commitOid": oid, "success": True})
            else:
                self.answer(404)

        def do_PUT(self) -> None:
            body = self.body()
            if state.fail_uploads > 0:
                state.fail_uploads -= 1
                self.answer(500)
                return
            digest = hashlib.sha256(body).hexdigest()
            assert self.path.endswith(digest)
            state.stored[digest] = body
            self.answer(200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
