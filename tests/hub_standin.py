"""A stand-in for the Hugging Face Hub on 127.0.0.1, so that the real clients can be tested without the internet.

    with HubStandin(folder) as hub:
        subprocess.run(command, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": empty_folder})

Repositories are plain folders, `folder/models/ORG/NAME/` and `folder/datasets/ORG/NAME/`, each with one branch (main)
and one commit. They can be read by transformers and datasets; huggingface_hub can create models and push to them.

Add DISABLE_SAFETENSORS_CONVERSION=1 to the environment where a model has only a pytorch_model.bin: transformers would
otherwise ask an online service to convert it, from a thread that prints a traceback when it fails.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import RepoCard

TOKEN = "hf_testtoken"  # the only token that may push


class HubStandin:
    """Serves `folder` while inside a `with` block; pushed files land in it too."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.url = None  # known once the server has a port
        self.requests = []  # (method, path with its query, authorization header or None), as they arrive
        self.refuse_push = False  # True: creating a repository and committing get 403
        self.created = {}  # repository -> what the client asked for when it created it

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # port 0: any free port
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class HubError(Exception):
    """An error answer. The clients tell most errors apart by `code` (the X-Error-Code header), not by the status."""

    def __init__(self, status, message, code=None, commit=None):
        super().__init__(message)
        self.status = status
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


class Repo:
    """One repository: a folder seen the way the Hub describes it."""

    def __init__(self, folder, revision=None):
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        # Made from the content, so that a client's cache can tell a repository from what it was before a push.
        content = "".join(f"{self.name(path)} {self.blob_id(path)}\n" for path in self.files)
        self.commit = hashlib.sha1(content.encode()).hexdigest()
        if revision not in (None, "main", self.commit):
            raise HubError(404, "Invalid revision", "RevisionNotFound")

    def name(self, path):
        return path.relative_to(self.folder).as_posix()

    @staticmethod
    def blob_id(path):
        """The id git gives to a file's content."""
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path):
        """One line of a listing."""
        if path.is_dir():
            return {"type": "directory", "path": self.name(path), "oid": "0" * 40}
        return {"type": "file", "path": self.name(path), "oid": self.blob_id(path), "size": path.stat().st_size}


class Handler(BaseHTTPRequestHandler):
    """Answers one request: finds its route, and calls the method named there with the parts of the path."""

    API = r"/api/(models|datasets)/([^/]+/[^/]+)"
    ROUTES = (
        ("GET", rf"{API}(?:/revision/([^/]+))?", "repo_info"),
        ("GET", rf"{API}/tree/([^/]+)(?:/(.+))?", "list_tree"),
        ("POST", rf"{API}/paths-info/([^/]+)", "paths_info"),
        ("GET HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "file"),
        ("GET", rf"{API}/auth-check(/write)?", "auth_check"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"{API}/preupload/([^/]+)", "preupload"),
        ("POST", rf"{API}/commit/([^/]+)", "commit"),
    )

    def answer(self):
        self.hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        self.url = urlsplit(self.path)
        try:
            for methods, pattern, action in self.ROUTES:
                match = re.fullmatch(pattern, self.url.path)
                if match and self.command in methods.split():
                    # Unquoted only now: a %2F inside a part is not a separator.
                    return getattr(self, action)(*(part and unquote(part) for part in match.groups()))
            raise HubError(404, "Not served by the stand-in")  # telemetry and the like: the clients do without
        except HubError as error:
            self.reply({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = answer

    def reply(self, content, status=200, headers=None):
        """Sends bytes as they are, and anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        """Silent: the tests look at hub.requests."""

    def repo(self, kind, repo_id, revision=None):
        return Repo(self.hub.folder / kind / repo_id, revision)

    # Reading

    def repo_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, revision)
        siblings = [{"rfilename": repo.name(path)} for path in repo.files]
        private = self.hub.created.get(repo_id, {}).get("visibility") == "private"
        card = repo.folder / "README.md"
        its = {"cardData": RepoCard.load(card).data.to_dict()} if card.is_file() else {}
        self.reply({"id": repo_id, "sha": repo.commit, "private": private, "tags": [], "siblings": siblings, **its})

    def list_tree(self, kind, repo_id, revision, path):
        repo = self.repo(kind, repo_id, revision)
        folder = repo.folder / (path or "")
        if not folder.is_dir():
            raise HubError(404, "Entry not found", "EntryNotFound")
        recursive = "recursive=true" in self.url.query
        self.reply([repo.entry(found) for found in sorted(folder.glob("**/*" if recursive else "*"))])

    def paths_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, revision)
        paths = [repo.folder / path for path in parse_qs(self.body.decode()).get("paths", [])]
        self.reply([repo.entry(path) for path in paths if path.exists()])  # the Hub leaves out those it does not have

    def file(self, prefix, repo_id, revision, path):
        repo = self.repo("datasets" if prefix else "models", repo_id, revision)
        file = repo.folder / path
        if file not in repo.files:
            # The commit lets the clients remember that this file does not exist.
            raise HubError(404, "Entry not found", "EntryNotFound", repo.commit)
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{repo.blob_id(file)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) < len(data):
            start, size = int(wanted[1]), len(data)
            data, status = data[start : int(wanted[2] or size) + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
        self.reply(data, status, headers)

    # Pushing

    def check_push(self, refused=False):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")
        if refused:
            raise HubError(403, "You don't have the rights to push here")

    def auth_check(self, kind, repo_id, write):
        self.check_push(self.hub.refuse_push and write)
        self.repo(kind, repo_id)
        self.reply({})

    def create_repo(self):
        self.check_push(self.hub.refuse_push)
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or 'testuser'}/{wanted['name']}"  # a bare name goes to the token's owner
        folder = self.hub.folder / "models" / repo_id
        status = 409 if folder.exists() else 200  # with exist_ok=True, the client reads the url in a 409 all the same
        folder.mkdir(parents=True, exist_ok=True)
        if status == 200:
            self.hub.created[repo_id] = wanted
        self.reply({"url": f"{self.hub.url}/{repo_id}"}, status)

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})  # asked before a README.md is pushed

    def preupload(self, kind, repo_id, revision):
        self.check_push()
        self.repo(kind, repo_id, revision)
        # "regular" whatever the size: the contents then come inside the commit, and no LFS or Xet server is needed.
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.reply({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def commit(self, kind, repo_id, revision):
        self.check_push(self.hub.refuse_push)
        repo = self.repo(kind, repo_id, revision)
        changes = [json.loads(line) for line in self.body.splitlines()][1:]  # the first line is the commit message
        if not {change["key"] for change in changes} <= {"file", "deletedFile"}:
            raise HubError(400, "The stand-in takes added and deleted files")
        for change in changes:
            file = repo.folder / change["value"]["path"]
            if change["key"] == "deletedFile":
                file.unlink()
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(change["value"]["content"]))
        oid = self.repo(kind, repo_id).commit
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})
