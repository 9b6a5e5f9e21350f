"""A server on loopback that speaks OpenAI's and Anthropic's protocols and fails as planned, of the standard library.

It answers `echo: TEXT` of the last turn. Faults are planned with `server.fail(...)` and happen to the next requests for an
answer, in order; `server.silent()` makes requests hang until the test ends. Batches are worked on only when the test says so
(`server.work(n)`). Protocols: https://platform.openai.com/docs/api-reference and https://docs.anthropic.com/en/api.
"""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, urlsplit


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Broken connections are planned here."""


class FakeServer:
    """`with FakeServer() as server:` serves at `server.url`; `key` is demanded when given."""

    def __init__(self, key=None, keep=True, port=0):
        self.key, self.keep, self.lock = key, keep, threading.Lock()
        self.bodies, self.headers, self.times, self.faults = [], [], [], []
        self.answered, self.running, self.most_running = 0, 0, 0
        self.files, self.batches, self.numbers = {}, {}, count(1)
        self.released, self.hanging, self.die_after = threading.Event(), False, None
        self.reply = lambda text: f"echo: {text}"
        self.http = Quiet(("127.0.0.1", port), self._handler())
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, status=None, times=1, body=None, headers=None, drop=False):
        """Plan `times` faults: a status with a body, a body that is no answer (status 200), or a dropped connection."""
        self.faults += [(status or 200, body, headers or {}, drop)] * times

    def silent(self):
        """From now on no request for an answer is answered."""
        self.hanging = True

    def work(self, rows=None, broken=(), end=None):
        """Answer up to `rows` rows of every batch, then end it; rows in `broken` fail; `end` is another last status."""
        for batch in self.batches.values():
            batch["work"](rows, set(broken), end)

    # -- what it says

    def completion(self, body):
        text = last_text(body["messages"])
        said = self.reply(text)
        schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
        if schema:
            said = json.dumps({name: (part.get("enum") or ["x"])[0] for name, part in schema["properties"].items()})
        words = said.split(" ")
        limit = body.get("max_tokens", body.get("max_completion_tokens", 16))
        cut = words[:limit]
        drawn = [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in cut]
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": body["model"], "usage": {
                    "prompt_tokens": len(text.split()), "completion_tokens": len(cut), "total_tokens": 0},
                "choices": [{"index": 0, "message": {"role": "assistant", "content": " ".join(cut)},
                             "logprobs": {"content": drawn} if body.get("logprobs") else None,
                             "finish_reason": "length" if len(cut) < len(words) else "stop"}]}

    def message(self, body):
        text = last_text(body["messages"])
        said = self.reply(text)
        schema = ((body.get("output_config") or {}).get("format") or {}).get("schema")
        if schema:
            said = json.dumps({name: part["enum"][0] for name, part in schema["properties"].items()})
        words = said.split(" ")
        cut = words[:body["max_tokens"]]
        return {"id": "m1", "type": "message", "role": "assistant", "model": body["model"], "stop_sequence": None,
                "content": [{"type": "text", "text": " ".join(cut)}],
                "stop_reason": "max_tokens" if len(cut) < len(words) else "end_turn",
                "usage": {"input_tokens": len(text.split()), "output_tokens": len(cut)}}

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, *words):
                """Say nothing."""

            def do_GET(self):
                self.route(None)

            def do_POST(self):
                self.route(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def route(self, raw):
                path = urlsplit(self.path).path
                if server.key and server.key not in (self.headers.get("Authorization", "").removeprefix("Bearer "),
                                                     self.headers.get("x-api-key")):
                    return self.send(401, {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error"}})
                if path in ("/v1/chat/completions", "/v1/messages", "/v1/completions"):
                    return self.answer(path, json.loads(raw))
                return self.send(*server.other(self.command, path, raw, self.headers, parse_qs(urlsplit(self.path).query)))

            def answer(self, path, body):
                with server.lock:
                    server.times.append(time.monotonic())
                    if server.keep:
                        server.bodies.append(body)
                        server.headers.append(dict(self.headers))
                    fault = server.faults.pop(0) if server.faults else None
                    if server.die_after is not None and server.answered >= server.die_after:
                        fault = (0, None, {}, True)
                    server.answered += fault is None
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    if server.hanging:
                        server.released.wait()
                        return self.drop()
                    if fault:
                        status, text, headers, drop = fault
                        return self.drop() if drop else self.send(
                            status, text if text is not None else {"error": {"message": f"planned {status}"}}, headers)
                    make = server.message if path == "/v1/messages" else server.completion
                    found = make(body)
                    return (self.stream(path, found, body) if body.get("stream") else self.send(200, found))
                finally:
                    with server.lock:
                        server.running -= 1

            def drop(self):
                """Break the connection off with a reset, without an answer."""
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            def send(self, status, body, headers=None):
                data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                kind = "application/json" if not isinstance(body, bytes) else "application/octet-stream"
                for name, value in {"Content-Type": kind, "Content-Length": len(data), **(headers or {})}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def stream(self, path, found, body):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                for event, data in (events_of if path == "/v1/messages" else chunks_of)(found):
                    if getattr(server, "cut_stream", False) and event == "last":
                        return self.drop()
                    name = f"event: {data['type']}\n" if path == "/v1/messages" else ""
                    self.wfile.write(f"{name}data: {json.dumps(data)}\n\n".encode())
                    self.wfile.flush()
                if path != "/v1/messages":
                    self.wfile.write(b"data: [DONE]\n\n")
                    self.wfile.flush()

        return Handler

    # -- models, files and batches

    def other(self, method, path, raw, headers, query):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "me"}]}
        if path == "/v1/files" and method == "POST":
            name = f"file-{next(self.numbers)}"
            self.files[name] = file_part(raw, headers)
            return 200, {"id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 1, "filename": "r.jsonl",
                         "purpose": "batch", "status": "processed"}
        if match := re.fullmatch(r"/v1/files/([\w-]+)/content", path):
            return (200, self.files[match[1]]) if match[1] in self.files else (404, {"error": {"message": "no such file"}})
        if path == "/v1/batches":
            if method == "POST":
                return self._new_batch(json.loads(raw))
            return 200, {"object": "list", "data": [public(b) for b in reversed(self.batches.values())], "has_more": False}
        if match := re.fullmatch(r"/v1/batches/([\w-]+)(/cancel)?", path):
            return self._batch(match[1], cancel=bool(match[2]))
        if path == "/v1/messages/batches":
            if method == "POST":
                return self._new_message_batch(json.loads(raw))
            return 200, {"data": [public(b) for b in reversed(self.batches.values())], "has_more": False, "first_id": None, "last_id": None}
        if match := re.fullmatch(r"/v1/messages/batches/([\w-]+)(/cancel|/results)?", path):
            if match[2] == "/results":
                return 200, b"".join(self.batches[match[1]]["lines"])
            return self._batch(match[1], cancel=match[2] == "/cancel")
        return 404, {"error": {"message": f"no route {path}"}}

    def _fault(self):
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
        return fault and (fault[0], fault[1] or {"error": {"message": f"planned {fault[0]}"}}, fault[2])

    def _new_batch(self, body):
        planned = self._fault()
        if planned and planned[0] != 599:
            return planned
        name = f"batch-{next(self.numbers)}"
        rows = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        batch = {"id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
                 "completion_window": "24h", "created_at": int(time.time()), "status": "in_progress",
                 "metadata": body.get("metadata"), "output_file_id": None, "error_file_id": None, "errors": None,
                 "request_counts": {"total": len(rows), "completed": 0, "failed": 0}}
        good, bad = [], []

        def work(limit, broken, end):
            if batch["status"] != "in_progress":
                return
            left = rows[len(good) + len(bad):][:limit]
            for row in left:
                row_id = {"id": "r", "custom_id": row["custom_id"]}
                if last_text(row["body"]["messages"]) in broken:
                    bad.append({**row_id, "response": {"status_code": 400, "body": {"error": {"message": "bad row"}}}, "error": None})
                else:
                    good.append({**row_id, "response": {"status_code": 200, "body": self.completion(row["body"])}, "error": None})
            batch["request_counts"] = {"total": len(rows), "completed": len(good), "failed": len(bad)}
            if end or len(good) + len(bad) == len(rows):
                self._end_batch(batch, good, bad, end or "completed")

        self.batches[name] = {**batch, "work": work, "good": good, "bad": bad, "public": batch}
        return (599, {"error": {"message": "the answer was lost"}}) if planned else (200, batch)

    def _end_batch(self, batch, good, bad, status):
        batch["status"] = status
        for key, lines in (("output_file_id", list(reversed(good))), ("error_file_id", bad)):
            if lines:
                batch[key] = f"file-{next(self.numbers)}"
                self.files[batch[key]] = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def _batch(self, name, cancel):
        if name not in self.batches:
            return 404, {"error": {"message": f"No batch found with id '{name}'"}}
        held = self.batches[name]
        if cancel and "processing_status" in held["public"]:
            held["work"](0, set(), "canceled")
        elif cancel and held["public"]["status"] == "in_progress":
            self._end_batch(held["public"], held["good"], held["bad"], "cancelled")
        return 200, held["public"]

    def _new_message_batch(self, body):
        planned = self._fault()
        if planned and planned[0] != 599:
            return planned
        name, rows, lines = f"msgbatch-{next(self.numbers)}", body["requests"], []
        batch = {"id": name, "type": "message_batch", "processing_status": "in_progress", "results_url": None,
                 "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "expires_at": "2026-12-01T00:00:00Z",
                 "ended_at": None, "archived_at": None, "cancel_initiated_at": None,
                 "request_counts": {"processing": len(rows), "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}}

        def work(limit, broken, end):
            if batch["processing_status"] != "in_progress":
                return
            for row in rows[len(lines):][:limit]:
                bad = last_text(row["params"]["messages"]) in broken
                result = ({"type": "errored", "error": {"type": "error", "error": {"type": "invalid_request_error", "message": "bad row"}}}
                          if bad else {"type": "succeeded", "message": self.message(row["params"])})
                lines.append(json.dumps({"custom_id": row["custom_id"], "result": result}).encode() + b"\n")
                batch["request_counts"]["errored" if bad else "succeeded"] += 1
                batch["request_counts"]["processing"] -= 1
            if end:
                for row in rows[len(lines):]:
                    lines.append(json.dumps({"custom_id": row["custom_id"], "result": {"type": end}}).encode() + b"\n")
                    batch["request_counts"][end] += 1
                    batch["request_counts"]["processing"] -= 1
            if len(lines) == len(rows):
                batch["processing_status"] = "ended"
                batch["results_url"] = f"http://127.0.0.1:{self.port}/v1/messages/batches/{name}/results"

        self.batches[name] = {"id": name, "work": work, "lines": lines, "public": batch}
        return (599, {"error": {"message": "the answer was lost"}}) if planned else (200, batch)


def public(batch):
    return batch["public"]


def last_text(messages):
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_in(body):
    """The image of the last turn of an OpenAI-style body, opened."""
    from PIL import Image

    url = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def file_part(raw, headers):
    """The bytes of the part named `file` of a form."""
    message = BytesParser().parsebytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + raw)
    return next(part.get_payload(decode=True) for part in message.get_payload()
                if part.get_param("name", header="content-disposition") == "file")


def chunks_of(found):
    """An OpenAI answer as (kind, chunk); the last has the finish reason."""
    choice, base = found["choices"][0], {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": found["model"]}
    words = choice["message"]["content"].split(" ")
    drawn = (choice["logprobs"] or {}).get("content") or [None] * len(words)
    for place, word in enumerate(words):
        yield "piece", {**base, "choices": [{"index": 0, "delta": {"content": (" " if place else "") + word}, "finish_reason": None,
                                             "logprobs": {"content": [drawn[place]]} if drawn[place] else None}]}
    yield "last", {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    yield "usage", {**base, "choices": [], "usage": found["usage"]}


def events_of(found):
    """An Anthropic answer as (kind, event)."""
    yield "start", {"type": "message_start", "message": {**found, "content": [], "stop_reason": None}}
    yield "start", {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for place, word in enumerate(found["content"][0]["text"].split(" ")):
        yield "piece", {"type": "content_block_delta", "index": 0,
                        "delta": {"type": "text_delta", "text": (" " if place else "") + word}}
    yield "piece", {"type": "content_block_stop", "index": 0}
    yield "last", {"type": "message_delta", "delta": {"stop_reason": found["stop_reason"], "stop_sequence": None},
                   "usage": {"output_tokens": found["usage"]["output_tokens"]}}
    yield "end", {"type": "message_stop"}
