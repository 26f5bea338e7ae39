"""Fetch published GPT-2 token shards from Hugging Face, as many as asked for or as a configuration needs.

    python -m data.download fineweb10B --shards 18         # and the validation shard, to data/fineweb10B
    python -m data.download --for configs/muon.yaml        # as many as that run reads, to where it reads them
    python -m data.download fineweb10B --check             # compare with the manifest, without network

Corpora: fineweb10B (103 shards for training), fineweb100B (1030), finewebedu10B (99), edu-100B (1001); 200 MB each.
A shard goes to NAME.part and gets its name when it is whole: header, length, SHA-256 as the hub publishes it and as
manifest.json has it from the first fetch. The same command again goes on where it stopped, within a file too, and
fetches only what is missing or damaged. HF_ENDPOINT names a mirror, HF_TOKEN an account.
"""
import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from data import corpora, hub, manifest
from data.arguments import Parser, at_least
from data.corpora import Corpus
from data.shards import ShardError, make_folder

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def in_threads(action: Callable, names: list[str], threads: int) -> Iterator[tuple]:
    """(name, action(name)) as they finish; a ShardError is a result, any other exception stops all."""
    def guarded(name: str):
        try:
            return action(name)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(guarded, name): name for name in names}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            hub.STOP.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time downloads into a folder; the kernel lets go of the lock of one that is killed."""
    with open(folder / ".download.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process downloads into it; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{folder}: no lock to be had ({error.strerror}); start no second download into it", flush=True)
        yield


def survey(corpus: Corpus, folder: Path, names: list[str], files: dict, threads: int,
           retries: int) -> tuple[dict[str, hub.Remote], list[ShardError]]:
    """What is to be fetched, by name, and what cannot be; whole shards that are new here are entered in `files`."""
    wanted, uncompared = set(), {}               # not here or damaged; whole, but never compared with the hub's
    for name, found in in_threads(lambda name: manifest.inspect(folder / name, files.get(name)), names, threads):
        if isinstance(found, ShardError):
            wanted.add(name)
            if (folder / name).exists():
                print(found, flush=True)
        elif files.get(name, {}).get("revision") is None:
            uncompared[name] = found

    remotes, failures = {}, []
    try:
        for name, remote in in_threads(lambda name: hub.look_up(corpus.repo, name, retries), [*wanted, *uncompared],
                                       threads):
            failures.append(remote) if isinstance(remote, ShardError) else remotes.update({name: remote})
    except hub.Unreachable as error:
        if wanted:
            raise hub.Unreachable(by_hand(corpus, folder, wanted, error)) from None
        print(f"{len(uncompared)} shards are whole, but {error}, so that they were not compared with the hub's")
        remotes = {name: hub.Remote("", None, None, None) for name in uncompared}
    for name in uncompared.keys() & remotes.keys():
        files[name] = {**uncompared[name], "revision": remotes[name].revision}
        if remotes[name].sha256 not in (None, uncompared[name]["sha256"]):
            print(f"{folder / name}: not the hub's file; it is fetched", flush=True)
            del files[name]
            wanted.add(name)
    for name in wanted & remotes.keys() & files.keys():
        if remotes[name].sha256 not in (None, files[name]["sha256"]):
            failures.append(ShardError(f"{remotes.pop(name).url}: the hub has another file now than {manifest.NAME} "
                                       f"says came first; to take it, remove {folder} and download all again"))
    return {name: remotes[name] for name in sorted(wanted & remotes.keys())}, failures


def download(corpus: Corpus, folder: Path, names: list[str], threads: int, retries: int) -> None:
    """Make `folder` hold the files `names` of `corpus`, whole.

    Raises:
        ShardError: one line for each file where that fails.
        hub.Unreachable: no network; the message says how to do it by hand.
    """
    record = manifest.read(folder)
    files = record["files"]
    if record["repo"] not in (None, corpus.repo):
        raise ShardError(f"{folder} holds shards of {record['repo']}, not of {corpus.repo}: choose another --out")
    record["repo"] = corpus.repo
    remotes, failures = survey(corpus, folder, names, files, threads, retries)

    parts = {name: folder / f"{name}.part" for name in remotes}
    total_bytes = sum(remote.size or 0 for remote in remotes.values())
    missing_bytes = total_bytes - sum(part.stat().st_size for part in parts.values() if part.exists())
    if missing_bytes > (free := shutil.disk_usage(folder).free):
        raise ShardError(f"{folder}: {missing_bytes / 1e9:.2f} GB are to come, but {free / 1e9:.2f} GB are free")
    manifest.write(folder, record)
    meter = Meter(len(parts), total_bytes, total_bytes - missing_bytes)

    def fetch(name: str) -> dict:
        first_sha256 = files.get(name, {}).get("sha256")
        return hub.fetch(remotes[name], folder / name, first_sha256, retries, meter.advance)

    try:
        for name, found in in_threads(fetch, list(parts), threads):
            if isinstance(found, ShardError):
                failures.append(found)
                continue
            files[name] = found
            manifest.write(folder, record)
            del parts[name]
            meter.finished(f"{folder / name}  {found['tokens']:,} tokens")
    except hub.Unreachable as error:
        raise hub.Unreachable(by_hand(corpus, folder, set(parts), error)) from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise ShardError(f"{folder}: {os.strerror(error.errno)}; unfinished files were removed, whole ones are kept: "
                         f"make room for {missing_bytes / 1e9:.2f} GB, then the same command goes on") from None
    finally:
        meter.close()
    if failures:
        raise ShardError("\n".join(sorted(map(str, failures))))


def by_hand(corpus: Corpus, folder: Path, names: set[str], reason: Exception) -> str:
    """What to do where there is no network."""
    from huggingface_hub import constants
    return "\n".join([
        f"{constants.ENDPOINT} cannot be reached ({reason}); {len(names)} files of {corpus.name} are missing or "
        f"damaged in {folder}.",
        "Behind a firewall HF_ENDPOINT=https://... names a mirror, HTTPS_PROXY a proxy. Or by hand: fetch, elsewhere,",
        *(f"    {hub.page(corpus.repo, name)}" for name in sorted(names)),
        f"put the files into {folder.resolve()} under the same names, and run this command again: it checks them."])


class Meter:
    """Bytes received and files finished: a bar on a terminal, plain lines elsewhere. Threads may call `advance`."""

    def __init__(self, files: int, total_bytes: int, done_bytes: int):
        self.files, self.total, self.done, self.finished_files = files, total_bytes, done_bytes, 0
        self.lock, self.begun, self.line_at, self.here = threading.Lock(), time.monotonic(), time.monotonic(), 0
        self.bar = None
        if files and sys.stdout.isatty():
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
            self.bar = Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.task = self.bar.add_task("", total=total_bytes, completed=done_bytes)
            self.bar.start()

    def advance(self, count: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, count)
            return
        with self.lock:
            self.done, self.here, now = self.done + count, self.here + count, time.monotonic()
            if now - self.line_at >= 30:
                self.line_at, rate = now, self.here / (now - self.begun)
                print(f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB  {rate / 1e6:.1f} MB/s  "
                      f"{max(0, self.total - self.done) / rate:,.0f} s left", flush=True)

    def finished(self, text: str) -> None:
        self.finished_files += 1
        text = f"{text}  ({self.finished_files} of {self.files})"
        print(text, flush=True) if self.bar is None else self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def check(folder: Path, names: list[str]) -> int:
    """The number of shards in `folder`, all as its manifest has them and `names` among them, or ShardError."""
    files, problems, good = manifest.read(folder)["files"], [], 0
    here = {path.name for path in folder.glob("*.bin")}
    if not here | files.keys():
        raise ShardError(f"{folder}: neither shards nor {manifest.NAME}; the same command without --check fetches them")
    for name, found in in_threads(lambda name: manifest.inspect(folder / name, files.get(name)),
                                  sorted(here | files.keys() | set(names)), os.cpu_count() or 1):
        if not isinstance(found, ShardError) and name not in files:
            found = ShardError(f"{folder / name}: whole, but not in {manifest.NAME}; the same command without "
                               "--check compares it with the hub's")
        if isinstance(found, ShardError):
            problems.append(str(found))
        else:
            good += 1
    if problems:
        raise ShardError("\n".join(sorted(problems)))
    return good


def resolved(config: str, overrides: list[str]) -> dict:
    """The configuration that `train.py --config config overrides` would run, as train.py itself prints it."""
    import yaml
    program = Path(__file__).resolve().parent.parent / "train.py"
    done = subprocess.run([sys.executable, program, "--config", config, "--print-config", *overrides],
                          capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"train.py --print-config ended with {done.returncode}"]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise ShardError("\n".join(told or lines[-1:]))
    return yaml.safe_load(done.stdout)


def choose(args, overrides: list[str]) -> tuple[Corpus | None, Path, list[str]]:
    """(corpus, folder, files) that the command line means."""
    if args.config:
        config = resolved(args.config, overrides)
        data = config["data"]
        corpus, folder = corpora.of_patterns(data["train"], data["val"], args.corpus)
        names = corpora.files_for(corpus, data["train"], data["order"], data["repeat"], config["steps"],
                                  config["batch_tokens"], config["seq_len"])
        print(f"{config['name']}: {config['steps']:,} steps of {config['batch_tokens']:,} tokens in data.order "
              f"{data['order']} read {len(names) - 1} of {corpus.name}'s {corpus.shards} shards", flush=True)
        return corpus, folder, names
    corpus = corpora.by_name(args.corpus) if args.corpus else None
    folder = args.out or Path("data") / args.corpus
    return corpus, folder, [] if args.shards is None else corpus.files(args.shards)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m data.download", __doc__)
    parser.add_argument("corpus", nargs="?", help="one of " + ", ".join(corpora.CORPORA))
    parser.add_argument("--shards", type=at_least(0), metavar="N", help="training shards, the first N")
    parser.add_argument("--for", dest="config", metavar="FILE", help="as many as this run reads; key=value may follow")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: data/CORPUS)")
    parser.add_argument("--check", action="store_true", help="fetch nothing; compare with DIR/manifest.json")
    parser.add_argument("--threads", type=at_least(1), default=8, metavar="N", help="files at a time (%(default)s)")
    parser.add_argument("--retries", type=at_least(0), default=5, metavar="N",
                        help="after failures in a row (%(default)s)")
    args, overrides = parser.parse_known_args(arguments)
    if args.corpus and "=" in args.corpus:               # --for FILE key=value
        args.corpus, overrides = None, [args.corpus, *overrides]
    if overrides and not args.config:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.config and (args.out or args.shards is not None):
        parser.error("--for says how many shards and where: leave out --shards and --out")
    if not args.config and not (args.corpus and args.shards is not None or args.check and (args.corpus or args.out)):
        parser.error("give a corpus and --shards N, or --for FILE, or a corpus or --out DIR with --check")
    if args.shards is not None and not args.corpus:
        parser.error("--shards needs a corpus")
    try:
        corpus, folder, names = choose(args, overrides)
        if args.check:
            print(f"{folder}: {check(folder, names)} shards, all as {manifest.NAME} has them")
            return 0
        hub.check_endpoint()
        make_folder(folder)
        with locked(folder):
            download(corpus, folder, names, args.threads, args.retries)
        print(f"{folder}: {len(names)} shards, all whole: {names[0]}"
              + (f", {names[1]} to {names[-1]}" if len(names) > 1 else ""))
        return 0
    except ShardError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    except hub.Unreachable as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or folder}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
