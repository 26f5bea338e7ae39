"""One file of a Hugging Face data set repository: what the hub says of it, and its bytes, whole or not at all.

huggingface_hub gives the session, the headers, the errors and the metadata. Its own download (2.4.0) begins every file
anew after an interruption, so the bytes are asked for here, from where NAME.part ends.
"""
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from data import manifest
from data.shards import ShardError

STOP = threading.Event()                # set when one failure, or Ctrl-C, ends all transfers of the process
HINTS = {401: "set HF_TOKEN if the repository wants an account", 403: "set HF_TOKEN if the repository wants an account",
         404: "no such file is there: correct HF_ENDPOINT, or take fewer shards"}


class Stopped(Exception):
    """This transfer ends because another one failed, or because of Ctrl-C."""


class Unreachable(Exception):
    """The hub cannot be asked; the message is the reason."""


@dataclass(frozen=True)
class Remote:
    url: str                # of the file at this revision
    size: int | None        # bytes
    sha256: str | None      # where the hub publishes it, as it does for large files
    revision: str           # commit of the repository


def check_endpoint() -> None:
    """ShardError where HF_ENDPOINT is no address: huggingface_hub would fail on it with a traceback."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ShardError(f"HF_ENDPOINT={endpoint!r} is no address like https://huggingface.co; correct it or unset it")


def page(repo: str, name: str, revision: str | None = None) -> str:
    from huggingface_hub import hf_hub_url
    return hf_hub_url(repo, name, repo_type="dataset", revision=revision)


def look_up(repo: str, name: str, retries: int) -> Remote:
    """What the hub says of a file: one HEAD request.

    Raises:
        Unreachable: no connection, or HF_HUB_OFFLINE.
        ShardError: the hub has no such file, refuses it, or keeps failing.
    """
    from huggingface_hub import get_hf_file_metadata
    url = page(repo, name)
    answer = patiently(lambda: get_hf_file_metadata(url), url, retries, connect_retries=0)
    if answer.commit_hash is None or answer.etag is None:
        raise ShardError(f"{url}: the answer is not a hub's (no commit, no ETag): correct HF_ENDPOINT or the proxy")
    sha256 = answer.etag if len(answer.etag) == 64 else None     # of a small file the ETag is git's SHA-1
    return Remote(page(repo, name, answer.commit_hash), answer.size, sha256, answer.commit_hash)


def patiently(request: Callable, url: str, retries: int, connect_retries: int):
    """request(), again after transient failures: up to `retries` in a row without a byte received between them.

    An exception of `request` says with the attribute `headway` that bytes were received before it.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    failures = 0
    while True:
        try:
            return request()
        except OfflineModeIsEnabled:
            raise Unreachable("HF_HUB_OFFLINE is set; unset it to download") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            reason, allowed = f"{status} {error.response.reason_phrase}", retries
            if status not in (408, 429) and status < 500:
                raise ShardError(f"{url}: {reason}; {HINTS.get(status, 'the hub refuses it')}") from None
        except httpx2.TransportError as error:
            unconnected = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))
            reason, allowed = str(error) or type(error).__name__, connect_retries if unconnected else retries
            failures = 0 if getattr(error, "headway", False) else failures
            if unconnected and failures >= allowed:
                raise Unreachable(reason) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:      # such as redirects in a circle
            raise ShardError(f"{url}: {error}; correct HF_ENDPOINT or the proxy") from None
        if failures >= allowed:
            raise ShardError(f"{url}: {reason}, {failures + 1} times in a row; the same command goes on from here")
        if STOP.wait(min(2 ** failures, 30)):
            raise Stopped
        failures += 1


def transfer(remote: Remote, part: Path, retries: int, advance: Callable[[int], None]) -> None:
    """Bring `part` to the file's full length, from the length that it has."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    def request() -> None:
        start = part.stat().st_size if part.exists() else 0
        if remote.size is None or start > remote.size:
            start = 0
        if start == remote.size:
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        received = 0
        try:
            with http_stream_backoff("GET", remote.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                                     retry_on_exceptions=(), retry_on_status_codes=429) as response:
                hf_raise_for_status(response)
                with open(part, "ab" if response.status_code == 206 else "wb") as file:
                    for piece in response.iter_bytes():
                        if STOP.is_set():
                            raise Stopped
                        file.write(piece)
                        received += len(piece)
                        advance(len(piece))
            if remote.size not in (None, part.stat().st_size):
                raise httpx2.RemoteProtocolError(f"{part.stat().st_size:,} of {remote.size:,} bytes came")
        except httpx2.TransportError as error:
            error.headway = received > 0
            raise

    patiently(request, remote.url, retries, connect_retries=retries)


def fetch(remote: Remote, path: Path, sha256: str | None, retries: int, advance: Callable[[int], None]) -> dict:
    """Fetch a shard to NAME.part and rename that to `path` when it is whole; what the manifest is to say of it.

    `sha256` is what it must have where the hub publishes nothing. A shard that comes damaged is fetched twice, no more.
    """
    part, wanted = path.with_name(f"{path.name}.part"), remote.sha256 or sha256
    for last in (False, True):
        transfer(remote, part, retries, advance)
        try:
            found = manifest.inspect(part)
            if wanted and found["sha256"] != wanted:
                raise ShardError(f"{remote.url}: SHA-256 of what came {found['sha256'][:12]}..., "
                                 f"{'published' if remote.sha256 else 'in the manifest'} {wanted[:12]}...; nothing was "
                                 "kept: try later, or another HF_ENDPOINT")
            os.replace(part, path)
            return {**found, "revision": remote.revision}
        except ShardError:
            part.unlink()                                # or it would be taken up again, damaged beginning and all
            if last:
                raise
