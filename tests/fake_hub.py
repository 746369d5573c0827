"""The Hub's model repositories, as far as an upload sees them, behind huggingface_hub's own HTTP client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import _http

http: Any = getattr(_http, "httpx2", None) or _http.httpx
"""The client library of the installed huggingface_hub."""
TOKEN = "hf_made_up"


@dataclass
class FakeHub:
    """Repositories and the requests that changed them."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """Method and path of each request, in order."""
    fails_at: str = ""
    """End of the path that is refused."""
    account: dict[str, Any] = field(default_factory=lambda: {"name": "owner", "type": "user", "orgs": []})

    def answer(self, request: Any) -> Any:
        path = request.url.path
        self.seen.append(f"{request.method} {path}")
        assert request.url.host == "huggingface.co"
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        if self.fails_at and path.endswith(self.fails_at):
            return http.Response(400, json={"error": "the disk is full"}, request=request)
        status, body = self._route(request.method, path, request.read())
        headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        return http.Response(status, json=body, headers=headers, request=request)

    def _route(self, method: str, path: str, sent: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(sent)
            return self._create(f"{wanted.get('organization') or 'owner'}/{wanted['name']}", wanted)
        owner, name, *action = path.removeprefix("/api/models/").split("/")
        repository = f"{owner}/{name}"
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if action[:1] == ["preupload"]:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(sent)["files"]]
            return 200, {"files": files}
        if action[:1] == ["commit"]:
            return self._commit(repository, sent)
        if action == ["settings"] and method == "PUT":
            wanted = json.loads(sent)
            self.private[repository] = wanted.get("private", wanted.get("visibility") == "private")
            return 200, {}
        return 200, {"id": repository, "sha": "0" * 40, "siblings": [], "private": self.private[repository]}

    def _create(self, repository: str, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if repository in self.repositories:
            return 409, {"error": "You already created this model repo"}
        self.repositories[repository] = {}
        self.private[repository] = wanted.get("private", wanted.get("visibility") == "private")
        return 200, {"url": f"https://huggingface.co/{repository}"}

    def _commit(self, repository: str, sent: bytes) -> tuple[int, dict[str, Any]]:
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                self.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"https://huggingface.co/{repository}/commit/{'0' * 40}"
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""}

    @contextmanager
    def listening(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
        """Answers instead of the network; the token comes from where huggingface_hub looks for it."""
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        before = _http._GLOBAL_CLIENT_FACTORY
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(self.answer)))
        try:
            yield self
        finally:
            huggingface_hub.set_client_factory(before)
