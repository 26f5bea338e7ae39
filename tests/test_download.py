"""The real command against a server on this machine that answers as huggingface.co does, and misbehaves when told."""
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data import corpora, download, manifest
from data.shards import ShardError, read_header, write_shard
from tests.conftest import ROOT, TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "/datasets/kjj0/fineweb10B-gpt2/resolve/"
VAL, ONE, TWO, THREE = corpora.CORPORA["fineweb10B"].files(3)


class Hub(BaseHTTPRequestHandler):
    """/datasets/REPO/resolve/REVISION/NAME redirects to the same server under another host name, as to a CDN."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        body, asked = server.files.get(name), self.headers.get("Range")
        server.log.append((self.command, self.path, asked, self.headers.get("Authorization")))
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if self.path.startswith(REPO):
            etag = server.published.get(name, hashlib.sha256(body).hexdigest())
            return self.answer(302, {"Location": f"http://localhost:{server.server_port}/cdn/{name}",
                                     "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"', "ETag": '"other"',
                                     "X-Linked-Size": str(server.sizes.get(name, len(body)))})
        fault = server.faults[name].pop(0) if server.faults.get(name) else ""
        if fault == "500":
            return self.answer(500)
        if fault == "ignore range":
            asked = None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if fault == "corrupt":
            body = body[:2000] + bytes(100) + body[2100:]
        if fault == "short":
            body = body[:len(body) // 2]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}") if asked else None
        self.end_headers()
        if fault in ("cut", "stall", "reset"):
            body = body[:(start + len(body)) // 2]
        for first in range(start, len(body), 20_000):
            self.wfile.write(body[first:first + 20_000])
            time.sleep(server.pause_s)
        if fault == "stall":
            time.sleep(3)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if fault in ("cut", "stall", "reset"):
            self.connection.close()

    def answer(self, status, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):        # a client that was killed
        pass


@pytest.fixture
def hub(tmp_path):
    server = Server(("127.0.0.1", 0), Hub)
    server.log, server.faults, server.published, server.sizes, server.pause_s = [], {}, {}, {}, 0
    server.files, source = {}, tmp_path / "shard"
    for number, name in enumerate((VAL, ONE, TWO, THREE)):
        write_shard(source, np.random.default_rng(number).integers(0, 50257, 150_000 + number))
        server.files[name] = source.read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def start(hub, *arguments, cwd, **options) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP"))}
    environment |= {"HF_ENDPOINT": hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}",
                    "HF_HOME": str(cwd / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "data.download", *map(str, arguments)], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(hub, *arguments, cwd, code=0, **options) -> str:
    """What the command printed on stdout, or where `code` is not 0 on stderr."""
    process = start(hub, *arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    return err if code else out


def refused(hub, *arguments, cwd, **options) -> str:
    """The one line of an error."""
    line, = run(hub, *arguments, cwd=cwd, code=2, **options).strip().splitlines()
    assert line.startswith("error: ")
    return line


def folder_is(folder, hub, names, others=()):
    """The files `names` are the hub's, and beside manifest and lock there are only `others`."""
    here = {path.name for path in folder.iterdir()} - {manifest.NAME, ".download.lock"}
    assert here == {*names, *others}
    for name in names:
        assert (folder / name).read_bytes() == hub.files[name], name


def gets(hub):
    """(name, Range) of each request for a file's bytes."""
    return [(path.rsplit("/", 1)[-1], asked) for command, path, asked, _ in hub.log
            if command == "GET" and "/cdn/" in path]


def wait_for(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# ---------------------------------------------------------------- fetching

def test_shards_come_whole_with_a_manifest_and_are_fetched_once(hub, tmp_path):
    folder = tmp_path / "data/fineweb10B"
    out = run(hub, "fineweb10B", "--shards", 2, cwd=tmp_path)
    assert f"{ONE}  150,001 tokens" in out and out.endswith(f"3 shards, all whole: {VAL}, {ONE} to {TWO}\n")
    folder_is(folder, hub, [VAL, ONE, TWO])
    written = json.loads((folder / manifest.NAME).read_text())
    assert written == {"repo": "kjj0/fineweb10B-gpt2", "files": {
        name: {"tokens": read_header(folder / name), "sha256": hashlib.sha256(hub.files[name]).hexdigest(),
               "revision": COMMIT} for name in (VAL, ONE, TWO)}}
    hub.log.clear()
    run(hub, "fineweb10B", "--shards", 2, cwd=tmp_path)
    assert hub.log == []                                            # not even a question
    assert "3 shards, all as" in run("http://127.0.0.1:9", "fineweb10B", "--check", cwd=tmp_path)
    run(hub, "fineweb10B", "--shards", 3, cwd=tmp_path)
    assert gets(hub) == [(THREE, None)]


def test_only_the_missing_and_the_damaged_are_fetched_again(hub, tmp_path):
    folder = tmp_path / "here"
    run(hub, "fineweb10B", "--shards", 3, "--out", folder, cwd=tmp_path)
    raw = bytearray(hub.files[ONE])
    raw[-7] ^= 1                                                    # the header and the length stay right
    (folder / ONE).write_bytes(raw)
    (folder / TWO).write_bytes(hub.files[TWO][:-2])
    (folder / THREE).unlink()
    lines = run(hub, "--check", "--out", folder, cwd=tmp_path, code=2).splitlines()
    assert [next(n for n in (ONE, TWO, THREE) if n in line) for line in lines] == [ONE, TWO, THREE]
    assert "SHA-256" in lines[0] and "cut off" in lines[1] and "missing" in lines[2]
    hub.log.clear()
    run(hub, "fineweb10B", "--shards", 3, "--out", folder, cwd=tmp_path)
    assert sorted(gets(hub)) == [(ONE, None), (TWO, None), (THREE, None)]
    folder_is(folder, hub, [VAL, ONE, TWO, THREE])


def test_a_bad_line_a_bad_server_and_a_bad_proxy_are_survived(hub, tmp_path):
    hub.faults = {VAL: ["cut", "reset"], ONE: ["stall"], TWO: ["500", "corrupt"], THREE: ["short", "ignore range"]}
    run(hub, "fineweb10B", "--shards", 3, "--retries", 1, cwd=tmp_path)
    folder_is(tmp_path / "data/fineweb10B", hub, [VAL, ONE, TWO, THREE])
    half = len(hub.files[VAL]) // 2
    # Each cut file goes on where it stopped: two failures in a row are allowed when bytes come between them.
    assert [asked for name, asked in gets(hub) if name == VAL] == [
        None, f"bytes={half}-", f"bytes={(half + len(hub.files[VAL])) // 2}-"]
    assert [asked for name, asked in gets(hub) if name == TWO] == [None, None, None]
    assert [asked for name, asked in gets(hub) if name == THREE] == [None, f"bytes={len(hub.files[THREE]) // 2}-"]


@pytest.mark.parametrize("spoil, says", [
    (lambda hub: hub.published.update({ONE: "f" * 64}), "published ffffffffffff..."),
    (lambda hub: hub.files.pop(ONE), "404 Not Found; no such file"),
    (lambda hub: hub.faults.update({ONE: ["500"] * 9}), "500 Internal Server Error, 1 times in a row"),
    (lambda hub: hub.faults.update({ONE: ["corrupt"] * 9}), "SHA-256"),
    (lambda hub: hub.files.update({ONE: b"<html>" * 999}), "magic number"),
    (lambda hub: hub.files.update({ONE: hub.files[ONE][:-2]}), "cut off or damaged")],
    ids=["wrong hash", "404", "500", "corrupt", "no shard", "truncated on the hub"])
def test_a_shard_that_cannot_be_had_is_one_line_and_the_others_come(hub, tmp_path, spoil, says):
    spoil(hub)
    line = refused(hub, "fineweb10B", "--shards", 2, "--retries", 0, cwd=tmp_path)
    assert ONE in line and says in line
    folder_is(tmp_path / "data/fineweb10B", hub, [VAL, TWO])


def test_a_hub_that_publishes_no_hash_is_held_to_the_manifest(hub, tmp_path):
    hub.published = {name: "ab" * 20 for name in hub.files}         # git's SHA-1, as of small files
    run(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    (tmp_path / "data/fineweb10B" / ONE).unlink()
    hub.faults = {ONE: ["corrupt"] * 2}
    assert "in the manifest" in refused(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    folder_is(tmp_path / "data/fineweb10B", hub, [VAL])


def test_a_corpus_that_changed_on_the_hub_is_not_mixed_with_the_old_one(hub, tmp_path):
    run(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    (tmp_path / "data/fineweb10B" / ONE).unlink()
    hub.files[ONE] = hub.files[TWO]
    assert "another file now" in refused(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    folder_is(tmp_path / "data/fineweb10B", hub, [VAL])
    assert "choose another --out" in refused(hub, "fineweb100B", "--shards", 1, "--out", "data/fineweb10B",
                                             cwd=tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path):
    run(hub, "fineweb10B", "--shards", 0, cwd=tmp_path, env={"HF_TOKEN": "hf_secret"})
    seen = {(path.startswith(REPO), token) for _, path, _, token in hub.log}
    assert seen == {(True, "Bearer hf_secret"), (False, None)}


# ---------------------------------------------------------------- no network

@pytest.mark.parametrize("endpoint, env, reason", [
    ("http://127.0.0.1:9", {}, "Connection refused"), ("http://hub.invalid", {}, "hub.invalid cannot be reached"),
    ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")])
def test_without_a_network_the_steps_by_hand_are_said(endpoint, env, reason, tmp_path):
    said = run(endpoint, "fineweb10B", "--shards", 1, cwd=tmp_path, code=2, env=env)
    assert said.startswith("error: ") and reason in said and "HF_ENDPOINT" in said
    assert [line.strip() for line in said.splitlines() if line.startswith("    ")] == [
        f"{endpoint}{REPO}main/{name}" for name in (ONE, VAL)]
    assert f"put the files into {tmp_path / 'data/fineweb10B'} " in said


@pytest.mark.parametrize("endpoint", ["", "hub", "ftp://hub", "http://[", "http://hub:99999"])
def test_an_endpoint_that_is_no_address_is_said_before_anything_else(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert download.main(["fineweb10B", "--shards", "0", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith(f"error: HF_ENDPOINT={endpoint!r} is no address")
    assert not (tmp_path / "x").exists()


def test_files_put_there_by_hand_are_taken_offline_and_compared_when_the_hub_is_back(hub, tmp_path):
    folder = tmp_path / "data/fineweb10B"
    folder.mkdir(parents=True)
    for name in (VAL, ONE):
        (folder / name).write_bytes(hub.files[name])
    (folder / TWO).write_bytes(hub.files[THREE])                    # a good shard, but another one
    out = run("http://127.0.0.1:9", "fineweb10B", "--shards", 2, cwd=tmp_path)
    assert "3 shards are whole, but" in out and "not compared" in out
    assert "all as" in run("http://127.0.0.1:9", "fineweb10B", "--check", "--shards", 2, cwd=tmp_path)
    assert f"{TWO}: not the hub's file" in run(hub, "fineweb10B", "--shards", 2, cwd=tmp_path)
    folder_is(folder, hub, [VAL, ONE, TWO])
    assert gets(hub) == [(TWO, None)]
    assert all(entry["revision"] == COMMIT for entry in manifest.read(folder)["files"].values())


# ---------------------------------------------------------------- kills, company, full disks

@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_download_that_is_stopped_goes_on_within_the_file(hub, tmp_path, signum, code):
    folder, hub.pause_s = tmp_path / "data/fineweb10B", 0.1
    process = start(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    part = folder / f"{ONE}.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 60_000)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in err
    folder_is(folder, hub, [], others=[f"{VAL}.part", f"{ONE}.part"])
    kept = part.stat().st_size
    hub.pause_s = 0
    hub.log.clear()
    run(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    assert (ONE, f"bytes={kept}-") in gets(hub)
    folder_is(folder, hub, [VAL, ONE])


def test_two_downloads_at_once_take_turns_and_fetch_each_shard_once(hub, tmp_path):
    hub.pause_s = 0.5
    first = start(hub, "fineweb10B", "--shards", 2, cwd=tmp_path)
    wait_for(lambda: gets(hub))
    second = start(hub, "fineweb10B", "--shards", 3, cwd=tmp_path)
    assert "waiting for it" in second.stdout.readline()
    hub.pause_s = 0
    for process in (first, second):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sorted(gets(hub)) == [(name, None) for name in (ONE, TWO, THREE, VAL)]
    folder_is(tmp_path / "data/fineweb10B", hub, [VAL, ONE, TWO, THREE])
    assert set(manifest.read(tmp_path / "data/fineweb10B")["files"]) == {VAL, ONE, TWO, THREE}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(hub, tmp_path):
    hub.files[VAL] = hub.files[VAL][:8] + np.int32(10).tobytes() + hub.files[VAL][12:1044]
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    line = refused(hub, "fineweb10B", "--shards", 2, "--threads", 1, cwd=tmp_path, **full)
    assert "File too large; unfinished files were removed" in line
    folder = tmp_path / "data/fineweb10B"
    assert not list(folder.glob("*.part")) and not (folder / ONE).exists() and not (folder / TWO).exists()
    run(hub, "fineweb10B", "--shards", 2, cwd=tmp_path)
    folder_is(folder, hub, [VAL, ONE, TWO])


def test_a_disk_with_too_little_room_is_said_before_anything_comes(hub, tmp_path):
    hub.sizes[ONE] = 10**18
    assert "1000000000.00 GB are to come, but" in refused(hub, "fineweb10B", "--shards", 1, cwd=tmp_path)
    assert gets(hub) == []


# ---------------------------------------------------------------- how many

@pytest.mark.parametrize("order, steps, shards", [
    ("2025-01", 3000, 16), ("2025-01", 3250, 18), ("2025-01", 5100, 27), ("2024-10", 6200, 33), ("2025-01", 9536, 51),
    ("continuous", 3800, 20), ("continuous", 19560, 103)])
def test_the_shards_of_the_records_are_counted_with_dropped_tails(order, steps, shards):
    corpus = corpora.CORPORA["fineweb10B"]
    names = corpora.files_for(corpus, "x/fineweb_train_*.bin", order, False, steps, 524_288, 1024)
    assert names == corpus.files(shards)


@pytest.mark.parametrize("preset, shards", [("muon", 18), ("adamw", 30), ("splus", 18), ("gpt2", 103)])
def test_every_preset_on_fineweb_names_its_corpus_and_its_header_says_how_many_shards(preset, shards):
    from harness.load import load
    loaded = load(f"{preset}.yaml")
    config, data = loaded.config, loaded.config.data
    corpus, folder = corpora.of_patterns(data.train, data.val)
    names = corpora.files_for(corpus, data.train, data.order, data.repeat, config.steps, config.batch_tokens,
                              config.seq_len)
    assert (corpus.name, str(folder), len(names) - 1) == ("fineweb10B", "data/fineweb10B", shards)
    if preset != "splus":
        assert f"{shards} shards of FineWeb-10B" in loaded.text


def test_a_run_longer_than_its_corpus_is_refused_unless_it_repeats():
    corpus, pattern = corpora.CORPORA["fineweb10B"], "x/fineweb_train_*.bin"
    with pytest.raises(ShardError, match=r"last for 19,560 steps in data.order continuous"):
        corpora.files_for(corpus, pattern, "continuous", False, 19_561, 524_288, 1024)
    assert len(corpora.files_for(corpus, pattern, "continuous", True, 19_561, 524_288, 1024)) == 104
    with pytest.raises(ShardError, match="the 9 training shards"):
        corpora.files_for(corpus, "x/fineweb_train_00000?.bin", "continuous", False, 3000, 524_288, 1024)


@pytest.mark.parametrize("train, val, name, chosen", [
    ("a/fineweb100B/fineweb_train_*.bin", "a/fineweb100B/fineweb_val_*.bin", None, "fineweb100B"),
    ("a/x/fineweb_train_*.bin", "a/x/fineweb_val_*.bin", "fineweb10B", "fineweb10B"),
    ("a/x/edu_fineweb_train_*.bin", "a/x/edu_fineweb_val_*.bin", None, "edu-100B"),
    ("a/x/fineweb_train_*.bin", "a/x/fineweb_val_*.bin", None, "name the corpus"),
    ("a/x/finewebedu_train_*.bin", "a/x/finewebedu_val_*.bin", "fineweb10B", "not those of fineweb10B"),
    ("a/x/finewebedu_train_*.bin", "b/finewebedu_val_*.bin", None, "data.val"),
    ("data/demo/train_*.bin", "data/demo/val_*.bin", None, "data.demo")])
def test_the_patterns_tell_the_corpus_or_are_refused(train, val, name, chosen):
    try:
        assert corpora.of_patterns(train, val, name)[0].name == chosen
    except ShardError as error:
        assert chosen in str(error)


def test_for_a_configuration_its_shards_come_to_where_it_reads_them(hub, tmp_path):
    config = tmp_path / "mine.yaml"
    text = TINY.format(data="D", runs="runs").replace("D/train_", "tokens/fineweb10B/fineweb_train_")
    config.write_text(text.replace("D/val_", "tokens/fineweb10B/fineweb_val_"))
    out = run(hub, "--for", config, "steps=500000", "val_every=500000", cwd=tmp_path)
    assert "500,000 steps of 256 tokens in data.order continuous read 2 of fineweb10B's 103 shards" in out
    folder_is(tmp_path / "tokens/fineweb10B", hub, [VAL, ONE, TWO])


# ---------------------------------------------------------------- bad input

def cpu_s() -> float:
    """Seconds of computing of all processes started here that have ended: another's work does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments, says", [
    (["fineweb11B", "--shards", 1], "no published corpus"), (["fineweb10B", "--shards", 104], "take 0 to 103"),
    (["fineweb10B"], "give a corpus and --shards"), (["fineweb10B", "--shards", 1, "steps=3"], "unrecognized"),
    (["--for", "muon.yaml", "--shards", 1], "leave out --shards"),
    (["--for", "muon.yaml", "stebs=3"], "stebs"), (["--check", "--out", "nothing"], "neither shards nor")])
def test_bad_arguments_are_said_in_one_line_within_seconds(arguments, says, tmp_path):
    begun = cpu_s()
    told = run("http://127.0.0.1:9", *arguments, cwd=tmp_path, code=2)
    assert told.startswith("error: ") and says in told and told.strip().count("\n") == 0
    assert cpu_s() - begun < (10 if "--for" in arguments else 3)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"a": 1}}', '{"repo": 1, "files": {"a": {"tokens": 1}}}'])
def test_a_damaged_manifest_is_said(text, tmp_path):
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(ShardError, match="is damaged: remove it"):
        manifest.read(tmp_path)


def test_a_shard_outside_the_manifest_fails_the_check(hub, tmp_path):
    run(hub, "fineweb10B", "--shards", 0, "--out", "d", cwd=tmp_path)
    (tmp_path / "d" / ONE).write_bytes(hub.files[ONE])
    assert "not in manifest.json" in refused(hub, "--check", "--out", "d", cwd=tmp_path)
    (tmp_path / "d" / ONE).unlink()
    assert f"{ONE}: missing" in refused(hub, "fineweb10B", "--check", "--out", "d", "--shards", 1, cwd=tmp_path)


def test_help_says_what_there_is_without_loading_the_hub():
    code = ("import sys\nfrom data.download import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print('loaded:', *sorted({'huggingface_hub', 'torch', 'rich', 'yaml'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "fineweb100B (1030)" in done.stdout and done.stdout.strip().endswith("loaded:"), done.stdout + done.stderr
