"""A local stand-in for the hub, with models and data sets."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[str, dict[str, dict[str, bytes]]]
"""Files by revision by repository; a data set's name begins with ``datasets/``, as in the hub's addresses."""


class Hub(BaseHTTPRequestHandler):
    """Handler of the three kinds of request that huggingface_hub makes to download files."""

    def do_GET(self):
        raw = urlsplit(self.path).path
        path = unquote(raw)
        self.server.asked.append(path)
        for name, revisions in self.server.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            if path == api or path.startswith(f"{api}/revision/"):
                revision = path.removeprefix(api).removeprefix("/revision/") or "main"
                if files := revisions.get(revision) or by_sha(revisions, name, revision):
                    siblings = [{"rfilename": file} for file in files]
                    return self.answer({"id": name, "sha": sha(name, files), "siblings": siblings})
            if path.startswith(f"{api}/tree/"):
                revision, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
                files = revisions.get(revision) or by_sha(revisions, name, revision)
                return self.answer([entry for entry in tree(files) if entry["path"].startswith(folder)])
            if path.startswith(f"{api}/paths-info/"):
                revision = path.removeprefix(f"{api}/paths-info/")
                files = revisions.get(revision) or by_sha(revisions, name, revision)
                length = int(self.headers.get("Content-Length", 0))
                wanted = parse_qs(self.rfile.read(length).decode())["paths"]
                return self.answer([entry for entry in tree(files) if entry["path"] in wanted])
            if path.startswith(f"/{name}/resolve/"):
                revision, _, file = raw.removeprefix(f"/{name}/resolve/").partition("/")  # a name may have a slash
                revision, file = unquote(revision), unquote(file)
                files = revisions.get(revision) or by_sha(revisions, name, revision)
                if file in files:
                    headers = {"X-Repo-Commit": sha(name, files), "ETag": f'"{sha(file, files[file])}"'}
                    return self.answer(files[file], headers)
                if files:
                    return self.answer({"error": "absent"}, {"X-Error-Code": "EntryNotFound"}, 404)
        known = any(name in path for name in self.server.repositories)
        return self.answer({"error": "absent"}, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, 404)

    do_HEAD = do_POST = do_GET

    def answer(self, body, headers=(), status=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def sha(*parts) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def by_sha(revisions: dict[str, dict[str, bytes]], name: str, commit: str) -> dict[str, bytes]:
    return next((files for files in revisions.values() if sha(name, files) == commit), {})


def tree(files: dict[str, bytes]) -> list[dict]:
    """Return the entries of all files and folders."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
    return [{"type": "directory", "path": folder, "size": 0, "oid": sha(folder)} for folder in sorted(folders)] + [
        {"type": "file", "path": file, "size": len(data), "oid": sha(file, data)} for file, data in files.items()
    ]


@contextmanager
def serving(repositories: Repositories) -> Iterator[ThreadingHTTPServer]:
    """Serve these; ``asked`` has the requested paths, ``environment`` the variables that select this server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.repositories = [], repositories
    server.environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
