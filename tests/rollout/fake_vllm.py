"""A server with the part of vLLM's HTTP API that the client uses, over transformers and the folder it reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from support import VOCABULARY
from transformers import AutoModelForCausalLM

OPENING = threading.Lock()  # transformers replaces tie_weights of all models meanwhile, and two would not put it back


class FakeVllm:
    """What the server holds. fault: the mistake that it makes, see its uses. calls: the paths that were asked for."""

    def __init__(self, fault: str = "", **config: Any) -> None:
        self.fault, self.calls, self.version, self.model = fault, list[str](), "default", None
        self.config = {
            "dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "hf_overrides": {"tie_word_embeddings": False},
        } | config  # fmt: skip
        self.vocabulary, self.root, self._lock = VOCABULARY, "none", threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON) of one request; one at a time."""
        with self._lock:
            self.calls.append(path)
            if self.fault == "busy" and path == "v1/completions" and self.calls.count(path) % 3:
                return 503, {"error": "try again"}
            return 200, getattr(self, path.split("?")[0].replace("/", "_"))(body)

    def v1_models(self, body: Any) -> Any:
        return {"data": [{"id": "tiny", "root": self.root}]}

    def server_info(self, body: Any) -> Any:
        return {"vllm_config": {"model_config": self.config}}

    def weight_info(self, body: Any) -> Any:
        return {"weight_version": "default" if self.fault == "restarted" else self.version}

    def update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def reset_prefix_cache(self, body: Any) -> Any:
        return {"success": self.fault != "cache"}

    def collective_rpc(self, body: Any) -> Any:
        if body["method"] != "reload_weights":
            return {"results": [None]}
        old, folder = self.model, Path(body["kwargs"]["weights_path"])
        if self.fault == "no_effect" and old is not None:
            return {"results": [None]}
        with OPENING:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert self.model.lm_head.weight is not self.model.model.embed_tokens.weight
        if self.fault == "old_head" and old is not None:
            self.model.lm_head.weight = old.lm_head.weight
        return {"results": [None]}

    def v1_completions(self, body: Any) -> Any:
        """Inverse CDF by a generator of the request's own seed."""
        ids, choice = list(body["prompt"]), {"token_ids": [], "logprobs": {"token_logprobs": []}}
        if any(int(token) >= self.vocabulary for token in body.get("logit_bias", {})):
            raise ValueError("logit_bias out of vocabulary")
        if self.model is None or self.fault == "empty":
            return {"choices": [choice | {"finish_reason": "length"}] if self.model is None else []}
        draw = torch.Generator().manual_seed(body["seed"] % 2**63)
        for _ in range(body["max_tokens"]):
            logps = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1].detach(), -1)
            shares = (logps / body["temperature"]).softmax(-1)
            token = int(shares.argmax() if body["top_k"] == 1 else torch.multinomial(shares, 1, generator=draw))
            ids.append(token)
            choice["token_ids"].append(token)
            shown = logps if self.config["logprobs_mode"] == "raw_logprobs" else shares.log()
            choice["logprobs"]["token_logprobs"].append(float(shown[token]))
            if token in body["stop_token_ids"]:
                break
        if self.fault == "cut" and body["max_tokens"] > 1:
            choice["logprobs"]["token_logprobs"].pop()
        return {"choices": [choice | {"finish_reason": "stop"}]}


@contextmanager
def serving(fake: FakeVllm) -> Iterator[str]:
    """A context with the address of a thread that serves `fake`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            try:
                status, answer = fake.answer(self.path[1:], body)
            except ValueError as error:
                status, answer = 400, {"error": str(error)}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
