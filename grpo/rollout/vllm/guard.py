"""What a server of ours answers: what a run asks for, and nothing else.

A run needs routes that vLLM has for developers alone, and with those come others: by /collective_rpc whoever reaches
the port writes files and sets the engine's environment. vLLM's own key guards but a part of its paths. So every request
passes here first, as ASGI middleware of `vllm serve`.
"""

import json
import os
import secrets
from typing import Any
from urllib.parse import parse_qs

from flashgrpo.grpo.rollout.vllm.options import API_KEY

_ROUTES = {
    "GET": {"/health", "/metrics", "/get_world_size"},
    "POST": {
        "/inference/v1/generate",
        "/tokenize",
        "/collective_rpc",
        "/pause",
        "/resume",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    },
}
_WORKER_METHODS = {"served_model", "weight_digests"}


class Guard:
    """Refuses other routes, and every one but /health without the key, where the environment has one."""

    def __init__(self, app: Any):
        self.app = app
        self.wanted = f"Bearer {key}".encode() if (key := os.environ.get(API_KEY)) else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif refusal := self._refusal(scope):
            status, message = refusal
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": {"message": message}}).encode()})
        else:
            await self.app(
                scope, _method_alone(scope, receive) if scope["path"] == "/collective_rpc" else receive, send
            )

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        method, path = scope["method"], scope["path"]
        found = dict(scope["headers"]).get(b"authorization", b"")
        if self.wanted and path != "/health" and not secrets.compare_digest(found, self.wanted):
            return 401, f"wanted this server's key; set {API_KEY} for the run as it was for `flashgrpo serve`"
        if path not in _ROUTES.get(method, ()) or (path == "/collective_rpc" and _method(scope) not in _WORKER_METHODS):
            return 403, f"{method} {path} is nothing that a training run asks for"
        return None


def _method(scope: Any) -> str:
    return parse_qs(scope["query_string"].decode(errors="replace")).get("method", [""])[0]


def _method_alone(scope: Any, receive: Any) -> Any:
    """The body of a call to the workers is written here: the method of the address, and no arguments."""
    bodies = [{"type": "http.request", "body": json.dumps({"method": _method(scope)}).encode()}]

    async def receive_written() -> Any:
        return bodies.pop() if bodies else await receive()  # which tells of a client that is gone

    return receive_written
