"""A minimal W&B server for `wandb.init(mode="online")` and the records of a run, on a local port."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"name": "someone", "username": "someone", "id": "1", "entity": "someone", "flags": "{}", "teams": {"edges": []}}
BUCKET = {
    "id": "1",
    "name": "run",
    "displayName": "run",
    "description": None,
    "config": "{}",
    "sweepName": None,
    "historyLineCount": 0,
    "project": {"id": "1", "name": "mone", "entity": {"id": "1", "name": "someone"}},
}


class Server(ThreadingHTTPServer):
    """Counts requests and collects the runs; close() makes it unreachable."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.streamed, self.asked, self.runs = 0, list[str](), list[dict[str, Any]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The value of WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        """Stop the server; can be called repeatedly."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        if self.path.endswith("/file_stream"):
            self.server.streamed += 1
            self.answer({"exitcode": None, "limits": {}})
            return
        request = json.loads(body) if body else {}
        query = request.get("query", "")
        self.server.asked.append(" ".join(query.split())[:80])
        data: dict[str, Any] = {"viewer": ENTITY, "serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "upsertBucket" in query:
            self.server.runs.append(request["variables"])
            data = {"upsertBucket": {"bucket": BUCKET, "inserted": True}}
        elif "model(" in query or "bucket(" in query:
            data = {"model": {"bucket": None}, "project": {"run": None}}
        elif "createRunFiles" in query:
            data = {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        self.answer({"data": data})

    def do_GET(self) -> None:
        self.answer({})

    do_PUT = do_GET

    def answer(self, content: dict[str, Any]) -> None:
        """Send a JSON response."""
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Do not log."""
