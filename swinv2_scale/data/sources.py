"""Bytes [start, end) of a shard by its URL, and what happens when they do not come.

    https://host/shards         range requests
    s3://bucket/shards          and gs://, abfs://, …: whatever fsspec and its plug-ins read
    pipe:ssh host cat /d/{}     the output of a shell command; {} is the shard's name. Offsets mean reading and skipping

A read that breaks goes on at the byte it has reached, after a wait that doubles and is jittered. Only what cannot get
better by waiting ends it at once: a shard that is not there, may not be read, or is not the one of the manifest.

HTTP is `requests`, which reads the environment's proxies, .netrc and certificates, and whose connections give bytes as
they arrive. fsspec's own HTTP and its buffered files neither continue within a block nor show status and headers, and
s3fs repeats on its own, uncounted: so fsspec is asked for pieces, each one request that we repeat.
"""

import hashlib
import logging
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import requests
import urllib3
from torch.utils.data import get_worker_info

from swinv2_scale import distributed
from swinv2_scale.data.cache import Cache, DamagedError

log = logging.getLogger(__name__)

# What `Reader.counters` counts: bytes that came from a source and those skipped to reach them, repeated requests, waits
# that ended by the read timeout; reads that the cache could serve and those for which it fetched a shard first.
COUNTERS = ("read_bytes", "skipped_bytes", "read_retries", "read_stalls", "cache_hits", "cache_misses")

FIRST_WAIT = 0.5  # seconds, doubled at each retry
LONGEST_WAIT = 60.0  # also the most that a server's Retry-After is granted
_BLOCK = 1 << 20  # bytes handed on at once
_PIECE = 8 << 20  # bytes of one request to fsspec, which are read again when it breaks
_KNOWN = 128  # objects of fsspec whose size and version are remembered
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that waiting may change

_RESUME = "check that the source is reachable, then repeat the command to resume"
_OTHER = "copy the shard again, or make its manifest anew"


class ReadError(OSError):
    """Bytes of a shard that could not be had; the message names rank, worker, shard, byte, attempts and remedy."""


class _AttemptError(Exception):
    """Why one attempt ended. `again` is whether waiting (at least `wait` seconds) may help."""

    def __init__(self, cause: str, *, remedy: str = _RESUME, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.remedy, self.again, self.wait = remedy, again, wait


class _StallError(_AttemptError):
    """Nothing came for the length of the read timeout."""


class _Object:
    """Size and version of an object, which must stay what they are from one attempt to the next."""

    def __init__(self, size: int | None) -> None:
        self.size, self.version = size, ""

    def check(self, size: int | None, version: str) -> None:
        if None not in (size, self.size) and size != self.size:
            cause = f"the source has {size} bytes, not {self.size}: it was changed or truncated"
            raise _AttemptError(cause, remedy=_OTHER, again=False)
        if self.version and version and version != self.version:
            cause = f"the source changed while it was read: its ETag was {self.version}, now it is {version}"
            remedy = f"{_OTHER}; servers that share a name must give a file one ETag"
            raise _AttemptError(cause, remedy=remedy, again=False)
        self.size, self.version = self.size if size is None else size, version or self.version


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is read through `Reader.blocks`, and not a path."""
    return bool(re.match(r"pipe:|[A-Za-z][\w+.-]+://", str(source)))


def join(root: str, name: str) -> str:
    """URL of the file `name` under `root`, or where {} stands in it; a query stays at the end."""
    if root.startswith("pipe:"):
        return root.replace("{}", shlex.quote(name)) if "{}" in root else f"{root}/{shlex.quote(name)}"
    if not root.startswith(("http://", "https://")):
        return f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


class Reader:
    """Reads shards, over a network with patience.

    cache             directory on a disk of this host that keeps whole shards of URLs, or None
    cache_gigabytes   10^9 bytes that the cache may hold; the shards that were not read for longest go first
    retries           attempts without a single new byte, after the first one, before a read is given up
    connect_timeout   seconds; of fsspec's sources only S3 has it
    read_timeout      seconds without a byte (fsspec: without a piece of 8 MiB) after which an attempt ends

    Paths are not read here, see `shards.read_sample`. `counters` holds what happened, by the names of COUNTERS. A
    Reader may be copied into other processes, by fork or by pickle; the copies count for themselves.
    """

    def __init__(
        self, *, cache: str | None, cache_gigabytes: float, retries: int, connect_timeout: float, read_timeout: float
    ) -> None:
        for name, value in {"connect_timeout": connect_timeout, "read_timeout": read_timeout}.items():
            if value <= 0:
                raise ValueError(f"data.{name} is {value} seconds; choose more than 0")
        if retries < 0:
            raise ValueError(f"data.retries is {retries}; choose 0 or more")
        self.cache = None if cache is None else Cache(Path(cache).expanduser(), int(cache_gigabytes * 1e9))
        self.retries, self.connect_timeout, self.read_timeout = retries, connect_timeout, read_timeout
        self.counters: Counter[str] = Counter()
        self._session, self._owner = requests.Session(), os.getpid()
        self._known: OrderedDict[str, tuple[int | None, str]] = OrderedDict()

    def take_counters(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted, self.counters = dict(self.counters), Counter()
        return counted

    def read(self, url: str, start: int, end: int, *, size: int, sha256: str = "") -> bytes:
        """Bytes [start, end) of a shard of `size` bytes, from the cache if there is one, which fetches the whole shard.

        Raises ReadError.
        """
        if self.cache is not None:
            entry = hashlib.sha256(f"{url}\n{size}\n{sha256}".encode()).hexdigest()
            content = self.cache.read(entry, start, end, size)
            self.counters["cache_misses" if content is None else "cache_hits"] += 1
            if content is None and self._fetch(entry, url, size, sha256):
                content = self.cache.read(entry, start, end, size)
            if content is not None:
                return content
        return b"".join(self.blocks(url, start, end, size=size))

    def read_all(self, url: str) -> bytes:
        """A whole object of unknown size, past the cache. Raises ReadError."""
        return b"".join(self.blocks(url, 0, None))

    def blocks(self, url: str, start: int, end: int | None, *, size: int | None = None) -> Generator[bytes, None, None]:
        """Bytes [start, end) as they come, past the cache; `end` None is the end of the object. Raises ReadError.

        `size` is that of the object, if it is known: another one is an error.
        """
        found = _Object(size)
        position, attempts, failed = start, 0, 0
        while end is None or position < end:
            attempts += 1
            try:
                with closing(self._attempt(url, position, end, found)) as blocks:
                    for block in blocks:
                        position, failed = position + len(block), 0
                        self.counters["read_bytes"] += len(block)
                        yield block
                if end is None:
                    end = position if found.size is None else found.size
                if position < end:
                    raise _AttemptError(f"the source ended {end - position} bytes early")
            except _AttemptError as fault:
                failed += 1
                self.counters["read_stalls"] += isinstance(fault, _StallError)
                self._known.pop(url, None)
                if not fault.again or failed > self.retries or position == end:
                    raise self._error(url, position, attempts, str(fault), fault.remedy) from None
                self.counters["read_retries"] += 1
                _wait(failed, fault.wait, url, position, fault)

    def _error(self, url: str, position: int, attempts: int, cause: str, remedy: str) -> ReadError:
        worker = get_worker_info()
        return ReadError(
            f"rank {distributed.rank()}, worker {worker.id if worker else 'none'} cannot read shard {shown(url)} from "
            f"byte {position} on, after {attempts} attempt(s): {cause}; {remedy}"
        )

    def _fetch(self, entry: str, url: str, size: int, sha256: str) -> bool:
        """The whole shard into the cache; False when there is no room. Contents must have the manifest's sha256."""
        assert self.cache is not None
        for attempt in (1, 2):  # a second one, as TCP's checksum of 16 bits lets some damage through
            try:
                with closing(self.blocks(url, 0, size, size=size)) as blocks:
                    return self.cache.fill(entry, size, blocks, sha256)
            except DamagedError as error:
                if attempt == 2:
                    raise self._error(url, 0, attempt, str(error), _OTHER) from None
                self.counters["read_retries"] += 1
        raise AssertionError

    def _attempt(self, url: str, start: int, end: int | None, found: _Object) -> Generator[bytes, None, None]:
        if self._owner != os.getpid():  # connections of the process that this one was forked from are not ours
            self._session, self._owner = requests.Session(), os.getpid()
        if url.startswith("pipe:"):
            return self._pipe(url.removeprefix("pipe:"), start, end, found)
        return (self._http if url.startswith(("http://", "https://")) else self._fsspec)(url, start, end, found)

    def _http(self, url: str, start: int, end: int | None, found: _Object) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
        timeout = (self.connect_timeout, self.read_timeout)
        try:
            with self._session.get(url, headers=headers, timeout=timeout, stream=True) as response:
                position, stop = _answered(response, start, end, found)
                while stop is None or position < stop:
                    block = response.raw.read1(_BLOCK if stop is None else min(_BLOCK, stop - position))
                    if not block:
                        return
                    skipped = min(max(0, start - position), len(block))
                    self.counters["skipped_bytes"] += skipped
                    position += len(block)
                    if skipped < len(block):
                        yield block[skipped:]
        except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError):
            raise _StallError(f"nothing came for {self.read_timeout} s (data.read_timeout)") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            # What urllib3 and requests say holds the URL with its query, which may be a signature: the root is enough.
            raise _AttemptError(_root_cause(error), again=not isinstance(error, ValueError)) from None

    def _fsspec(self, url: str, start: int, end: int | None, found: _Object) -> Generator[bytes, None, None]:
        import fsspec
        from fsspec.asyn import sync
        from fsspec.exceptions import FSTimeoutError

        try:
            system, path = fsspec.url_to_fs(url, **self._options(url))
        except ImportError as error:
            remedy = "`pip install 'swinv2-scale[s3]'` for s3://, or fsspec's package for this source"
            raise _AttemptError(str(error), remedy=remedy, again=False) from None
        except ValueError as error:
            remedy = "write file paths without a scheme, or one of http, https, s3 or what fsspec knows"
            raise _AttemptError(str(error), remedy=remedy, again=False) from None
        if hasattr(system, "retries"):
            system.retries = 1  # attempts of s3fs and gcsfs themselves, five or six by default

        def call(name: str, **arguments: Any) -> Any:
            if not system.async_impl:
                return getattr(system, name)(path, **arguments)
            return sync(system.loop, getattr(system, f"_{name}"), path, timeout=self.read_timeout, **arguments)

        try:
            if url not in self._known:
                info = call("info")
                versions = (info.get(key) for key in ("ETag", "etag", "md5", "mtime"))
                self._known[url] = info.get("size"), str(next(filter(None, versions), ""))
                if len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
            self._known.move_to_end(url)
            found.check(*self._known[url])
            stop = end if end is not None else found.size
            while stop is None or start < stop:
                until = start + _PIECE if stop is None else min(start + _PIECE, stop)
                piece = call("cat_file", start=start, end=until)
                start += len(piece)
                if piece:
                    yield piece
                if start < until:
                    return
        except FSTimeoutError:
            raise _StallError(f"no piece came for {self.read_timeout} s (data.read_timeout)") from None
        except (FileNotFoundError, PermissionError) as error:
            remedy = "correct the URL, or the credentials that the source's client finds"
            raise _AttemptError(f"{type(error).__name__}: {error}", remedy=remedy, again=False) from None
        except _AttemptError:
            raise
        except Exception as error:  # plug-ins raise whatever their clients do
            raise _AttemptError(f"{type(error).__name__}: {error}") from None

    def _options(self, url: str) -> dict[str, Any]:
        """What fsspec's file system is made with, beside its own configuration (credentials, endpoint)."""
        if not url.startswith(("s3://", "s3a://")):
            return {}
        timeouts = {"connect_timeout": self.connect_timeout, "read_timeout": self.read_timeout}
        return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}}

    def _pipe(self, command: str, start: int, end: int | None, found: _Object) -> Generator[bytes, None, None]:
        position = 0
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command, shell=True, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            ) as shell,
        ):
            assert shell.stdout is not None
            output = shell.stdout.fileno()
            waiting = select.poll()
            waiting.register(output)
            try:
                # Read to its end where that is wanted: only then are its length and its exit code known.
                while end is None or position < end or end == found.size:
                    if not waiting.poll(1000 * self.read_timeout):
                        raise _StallError(f"the command gave nothing for {self.read_timeout} s (data.read_timeout)")
                    block = os.read(output, _BLOCK)
                    if not block:
                        break
                    skipped = min(max(0, start - position), len(block))
                    kept = block[skipped : len(block) if end is None else max(skipped, end - position)]
                    self.counters["skipped_bytes"] += skipped
                    position += len(block)
                    if found.size is not None and position > found.size:
                        found.check(position, "")
                    if kept:
                        yield kept
                else:
                    return
                shell.wait()
                if shell.returncode:
                    errors.seek(-min(500, errors.seek(0, os.SEEK_END)), os.SEEK_END)
                    said = errors.read().decode(errors="replace").strip()
                    raise _AttemptError(f"the command ended at byte {position} with code {shell.returncode}: {said}")
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)


def _answered(response: requests.Response, start: int, end: int | None, found: _Object) -> tuple[int, int | None]:
    """First byte of a response's body, and the byte at which to leave it; raises _AttemptError for useless answers."""
    status, headers = response.status_code, response.headers
    answer = f"the server answered {status} {response.reason}"
    if status in _PASSING:
        raise _AttemptError(answer, wait=_retry_after(headers))
    span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("Content-Range", ""))
    total = int(span[3]) if span and span[3] != "*" else None
    if status == 416:
        found.check(total, "")
    if status not in (200, 206):
        raise _AttemptError(
            answer, remedy="correct the URL, or the credentials (in the URL or in ~/.netrc)", again=False
        )
    if (coding := headers.get("Content-Encoding", "identity")) != "identity":
        raise _AttemptError(f"the server sends {coding}", remedy="switch its compression off for shards", again=False)
    length = int(text) if (text := headers.get("Content-Length", "")).isdecimal() else None
    if status == 206:
        if not span or span[1] is None or int(span[1]) != start or length not in (None, int(span[2]) + 1 - start):
            said = f"Content-Range {headers.get('Content-Range')!r} and Content-Length {length}"
            raise _AttemptError(f"asked for bytes from {start} on, the server gives {said}")
        found.check(total, headers.get("ETag", ""))
        return start, int(span[2]) + 1 if end is None else min(end, int(span[2]) + 1)
    if None not in (length, found.size) and length != found.size:  # maybe some proxy's page: worth another attempt
        raise _AttemptError(f"the server gives {length} bytes (Content-Length), not {found.size}", remedy=_OTHER)
    found.check(length, headers.get("ETag", ""))
    if start > 0:
        host = urlsplit(response.url).hostname
        _warn(
            f"{host} does not serve ranges: each read starts at byte 0 and skips; set data.cache to fetch shards once"
        )
    return 0, found.size if end is None else end


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server wants to be left alone; 0 where it does not say, or not so that it can be read."""
    with suppress(urllib3.exceptions.InvalidHeader):
        return float(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0")))
    return 0.0


def _wait(failed: int, wanted: float, url: str, position: int, fault: _AttemptError) -> None:
    """Sleeps before a retry. The jitter is not drawn from a generator that forked workers share, or that trains."""
    seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failed - 1)) * random.SystemRandom().uniform(0.5, 1)
    seconds = max(seconds, min(LONGEST_WAIT, wanted))
    log.info("%s at byte %d: %s; again in %.1f s", shown(url), position, fault, seconds)
    time.sleep(seconds)


def shown(url: str) -> str:
    """A URL without passwords and signatures; commands are shown as they are."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _root_cause(error: BaseException) -> str:
    """What lies beneath the layers of an error: "[Errno 111] Connection refused"."""
    while True:
        layers = (error.__cause__, error.__context__, getattr(error, "reason", None), *error.args)
        inner = next((layer for layer in layers if isinstance(layer, BaseException)), None)
        if inner is None:
            return f"{type(error).__name__}: {error}"
        error = inner


@cache
def _warn(text: str) -> None:
    """Logs a warning, once in a process."""
    log.warning(text)
