"""Shards over real servers and bad networks: reading goes on, nothing is lost or repeated, and counters tell."""

import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from fault_proxy import FaultProxy, storm
from PIL import Image
from real_runs import run

from swinv2_scale.data import sources
from swinv2_scale.data.folder import one_file
from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.pack import write_shards
from swinv2_scale.data.sources import Reader, ReadError
from swinv2_scale.data.stream import Stream, training_stream
from swinv2_scale.data.transforms import SimMIMTransform, collate

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
MakeReader = Callable[..., Reader]
Serve = Callable[[Path], int]

nginx_only = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """60 images of about 16 kB in 6 shards of about 170 kB; a global batch of 20 makes 3 steps an epoch."""
    random = np.random.default_rng(0)
    items = []
    for i in range(60):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(buffer, "PNG")
        items.append(one_file(f"k{i:02d}", "png", i % 4, buffer.getvalue()))
    root = tmp_path_factory.mktemp("packed")
    return write_shards(items, root, classes=list("abcd"), shard_size=10, seed=0, origin={})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.002)


@pytest.fixture
def make_reader() -> MakeReader:
    def make(**changes: Any) -> Reader:
        settings = {"cache": None, "cache_gigabytes": 1.0, "retries": 8, "connect_timeout": 5.0, "read_timeout": 5.0}
        return Reader(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """serve(directory) starts an nginx over it and returns its port."""
    started = []

    def start(directory: Path) -> int:
        place = tmp_path_factory.mktemp("nginx")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        temporary = "\n".join(
            f"{name}_temp_path {place}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (place / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;\n"
            f"events {{ worker_connections 64; }}\n"
            f"http {{ access_log off; {temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; root {directory}; }} }}\n"
        )
        assert NGINX is not None
        process = subprocess.Popen([NGINX, "-p", place, "-e", place / "error.log", "-c", place / "nginx.conf"])
        started.append(process)
        _await(port)
        return port

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(10)


@pytest.fixture(scope="module")
def nginx(serve: Serve, packed: Manifest) -> int:
    """Port of a server of the shards."""
    return serve(Path(packed.root))


def _await(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.02)


def content_of(manifest: Manifest, number: int = 0) -> bytes:
    return (Path(manifest.root) / manifest.shards[number].name).read_bytes()


def url_of(port: int, manifest: Manifest, number: int = 0) -> str:
    return f"http://127.0.0.1:{port}/{manifest.shards[number].name}"


def batches(manifest: Manifest, *, workers: int = 0) -> tuple[list[dict[str, Any]], Stream]:
    """Two epochs of one rank, and the stream that gave them."""
    transform = SimMIMTransform(
        image_size=32, crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5, mask_unit=8, mask_ratio=0.6
    )
    data = Mixture((manifest,))
    stream = training_stream(
        data,
        data.order(seed=3, global_batch=20),
        transform,
        collate,
        micro_batch=20,
        rank=0,
        world_size=1,
        workers=workers,
        start_step=0,
        stop_step=6,
        max_corrupt_share=0.0,
    )
    return list(stream), stream


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["mask"], other["mask"])


# What a server serves


@nginx_only
def test_ranges_are_the_bytes_of_the_file(nginx: int, packed: Manifest, make_reader: MakeReader) -> None:
    reader, content = make_reader(), content_of(packed)
    random = np.random.default_rng(1)
    asked = 0
    for _ in range(40):
        start, end = sorted(random.integers(0, len(content), 2).tolist())
        assert reader.read(url_of(nginx, packed), start, end, size=len(content)) == content[start:end]
        asked += end - start
    assert reader.read_all(url_of(nginx, packed)) == content
    assert reader.take_counters() == {"read_bytes": asked + len(content), "skipped_bytes": 0}
    assert reader.counters == {}


@nginx_only
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_over_http_is_that_of_local_files(
    nginx: int, packed: Manifest, make_reader: MakeReader, tmp_path: Path, workers: int
) -> None:
    expected, _ = batches(packed)
    for cache in (None, str(tmp_path)):
        remote = open_manifest(f"http://127.0.0.1:{nginx}", make_reader(cache=cache))
        assert remote.hash == packed.hash
        found, stream = batches(remote, workers=workers)
        assert_same(found, expected)
        if cache is None:
            assert stream.reads["read_bytes"] == sum(remote.locate(i)[2] for i in range(60)) * 2
        elif workers == 0:
            assert (stream.reads["cache_misses"], stream.reads["cache_hits"]) == (6, 114)
            assert stream.reads["read_bytes"] == sum(shard.bytes for shard in packed.shards)
        else:
            assert stream.reads["read_bytes"] == sum(shard.bytes for shard in packed.shards)
        assert stream.reads["read_retries"] == 0


@nginx_only
def test_a_server_that_gzips_is_refused(nginx: int, packed: Manifest, make_reader: MakeReader, monkeypatch) -> None:
    original = sources._answered

    def answered(response: requests.Response, *rest: Any) -> Any:
        response.headers["Content-Encoding"] = "gzip"
        return original(response, *rest)

    monkeypatch.setattr(sources, "_answered", answered)
    with pytest.raises(ReadError, match="sends gzip; switch its compression off"):
        make_reader().read(url_of(nginx, packed), 0, 10, size=packed.shards[0].bytes)


# What a network does to it


@nginx_only
@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("reset", {"read_retries": 3}),
        ("cut", {"read_retries": 3}),
        ("stall", {"read_retries": 3, "read_stalls": 3}),
        ("503", {"read_retries": 3}),
        ("429", {"read_retries": 3}),
        ("length", {"read_retries": 3}),
        ("page", {"read_retries": 3}),
        ("ranges", {"skipped_bytes": 50_000}),
    ],
)
def test_a_read_goes_on_at_the_byte_it_has_reached(nginx, packed, make_reader, fault, counted):
    reader, content = make_reader(read_timeout=0.3 if fault == "stall" else 5.0), content_of(packed)
    with FaultProxy(nginx, 3 * [fault]) as proxy:
        parts = list(reader.blocks(url_of(proxy.port, packed), 50_000, len(content), size=len(content)))
    assert b"".join(parts) == content[50_000:]
    assert proxy.seen[fault] == (1 if fault == "ranges" else 3)
    nothing = {"read_stalls": 0, "skipped_bytes": 0, "read_retries": 0}
    assert {**nothing, **reader.counters} == {**nothing, "read_bytes": len(content) - 50_000, **counted}


@nginx_only
@pytest.mark.parametrize(("workers", "cached"), [(0, False), (2, False), (2, True)])
def test_an_epoch_through_a_storm_of_faults_is_that_of_local_files(
    nginx: int, packed: Manifest, make_reader: MakeReader, tmp_path: Path, workers: int, cached: bool
) -> None:
    expected, _ = batches(packed)
    faults = storm(7, 0.6 if cached else 0.25, ("reset", "cut", "stall", "503", "429", "length", "page", "ranges"))
    with FaultProxy(nginx, faults) as proxy:
        cache = str(tmp_path) if cached else None
        reader = make_reader(cache=cache, read_timeout=0.1)
        found, stream = batches(open_manifest(f"http://127.0.0.1:{proxy.port}", reader), workers=workers)
    assert_same(found, expected)
    assert stream.corrupt.count == 0
    assert stream.reads["read_retries"] > 3 and proxy.seen.total() - proxy.seen[""] > 5
    whole = sum(shard.bytes for shard in packed.shards)
    once = whole if cached else sum(packed.locate(i)[2] for i in range(60)) * 2
    assert stream.reads["read_bytes"] == once  # nothing was read twice
    assert (stream.reads["read_stalls"] > 0) or proxy.seen["stall"] == 0


@nginx_only
def test_retry_after_is_waited_for_up_to_a_limit(nginx, packed, make_reader, monkeypatch):
    slept = []
    monkeypatch.setattr(sources.time, "sleep", slept.append)
    with FaultProxy(nginx, ["503", "429"], retry_after="7") as proxy:
        make_reader().read(url_of(proxy.port, packed), 0, 10, size=packed.shards[0].bytes)
    with FaultProxy(nginx, ["503"], retry_after="86400") as proxy:
        make_reader().read(url_of(proxy.port, packed), 0, 10, size=packed.shards[0].bytes)
    with FaultProxy(nginx, ["503"], retry_after="tomorrow") as proxy:
        make_reader().read(url_of(proxy.port, packed), 0, 10, size=packed.shards[0].bytes)
    assert slept[:3] == [7, 7, sources.LONGEST_WAIT] and 0 < slept[3] < 0.01


@nginx_only
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("stall", r"nothing came for 0.25 s \(data.read_timeout\)"),
        ("503", "the server answered 503 Busy"),
        ("page", r"the server gives 13 bytes \(Content-Length\), not \d+"),
    ],
)
def test_what_does_not_end_is_given_up_with_all_that_is_known(nginx, packed, make_reader, monkeypatch, fault, cause):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    # A fault without progress: the stalled body is one of byte 0.
    with FaultProxy(nginx, 99 * [fault]) as proxy:
        monkeypatch.setattr(proxy._random, "random", lambda: 0.0)
        url = url_of(proxy.port, packed).replace("http://", "http://user:secret@") + "?signature=secret"
        with pytest.raises(ReadError, match=cause) as caught:
            make_reader(retries=2, read_timeout=0.25).read(url, 512, 4096, size=packed.shards[0].bytes)
    message = str(caught.value)
    assert f"rank 3, worker none cannot read shard {url_of(proxy.port, packed)} from byte 512 on" in message
    assert "after 3 attempt(s)" in message and "secret" not in message
    assert proxy.seen[fault] == 3


@nginx_only
def test_a_worker_that_gives_up_says_which_it_is(nginx, packed, make_reader):
    remote = dataclasses.replace(packed, root=f"http://127.0.0.1:{nginx}/elsewhere", reader=make_reader())
    with pytest.raises(ReadError, match=r"rank 0, worker 0 cannot read shard http://.*404 Not Found; correct the URL"):
        batches(remote, workers=1)


def test_a_server_that_is_not_there_is_named_without_the_query(packed, make_reader):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/a.tar?signature=secret"
        with pytest.raises(ReadError, match=r"byte 5 on, after 2 attempt\(s\): .*refused") as caught:
            make_reader(retries=1).read(url, 5, 10, size=10)
    assert "secret" not in str(caught.value)


# What is not the shard that the manifest means


@nginx_only
def test_an_object_that_changes_between_attempts_is_refused(nginx, packed, make_reader):
    content = content_of(packed)
    with FaultProxy(nginx, ["cut", "etag"]) as proxy, pytest.raises(ReadError, match=r"its ETag was .*, now it is"):
        make_reader().read(url_of(proxy.port, packed), 0, len(content), size=len(content))
    assert proxy.seen == {"cut": 1, "etag": 1}


@nginx_only
def test_an_object_of_another_size_is_refused_at_once(nginx, packed, make_reader):
    size = packed.shards[0].bytes
    for asked in (0, size):  # the second is past the end: 416
        with pytest.raises(ReadError, match=rf"has {size} bytes, not {size + 512}: it was changed or truncated"):
            make_reader().read(url_of(nginx, packed), asked, asked + 512, size=size + 512)
    with pytest.raises(ReadError, match=rf"has {size} bytes, not {size - 512}"):
        make_reader().read(url_of(nginx, packed), 0, 512, size=size - 512)


@nginx_only
def test_damage_on_the_way_is_fetched_again_and_another_content_refused(nginx, packed, make_reader, tmp_path):
    shard, content = packed.shards[0], content_of(packed)
    reader = make_reader(cache=str(tmp_path))
    with FaultProxy(nginx, ["damage"]) as proxy:
        url = url_of(proxy.port, packed)
        assert reader.read(url, 100, 9000, size=shard.bytes, sha256=shard.sha256) == content[100:9000]
        assert reader.counters["read_retries"] == 1
        with pytest.raises(ReadError, match=f"sha256 {shard.sha256}, the manifest says {'0' * 64}; copy the shard"):
            reader.read(url, 100, 9000, size=shard.bytes, sha256="0" * 64)
    assert len(list(tmp_path.glob("[!.]*"))) == 1  # and nothing is left of what was refused


# The cache between processes


@nginx_only
def test_processes_fetch_a_shard_once_together(nginx, packed, make_reader, tmp_path):
    expected = [content_of(packed, number) for number in range(6)]
    fork = multiprocessing.get_context("fork")
    with FaultProxy(nginx, storm(1, 0.3, ("reset", "503"))) as proxy:
        reader, results = make_reader(cache=str(tmp_path)), fork.Queue()

        def read(first: int) -> None:
            numbers = [(first + i) % 6 for i in range(6)]
            found = [
                reader.read(url_of(proxy.port, packed, n), 0, len(expected[n]), size=len(expected[n])) for n in numbers
            ]
            results.put(([found[numbers.index(n)] for n in range(6)] == expected, dict(reader.counters)))

        processes = [fork.Process(target=read, args=(first,)) for first in (0, 0, 3)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join(10)
    assert all(same for same, _ in outcomes)
    assert sum(counters.get("read_bytes", 0) for _, counters in outcomes) == sum(map(len, expected))


@nginx_only
def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_served(nginx, packed, make_reader, tmp_path):
    content, shard = content_of(packed), packed.shards[0]
    with FaultProxy(nginx, ["stall"]) as proxy:
        reader = make_reader(cache=str(tmp_path), read_timeout=60.0)
        process = multiprocessing.get_context("fork").Process(
            target=reader.read, args=(url_of(proxy.port, packed), 0, 10), kwargs={"size": shard.bytes}
        )
        process.start()
        deadline = time.monotonic() + 10
        while not proxy.seen["stall"]:  # its room is taken by then
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        assert [path.stat().st_size for path in tmp_path.glob("*.partial")] == [shard.bytes]
        assert reader.read(url_of(proxy.port, packed), 7, 99, size=shard.bytes) == content[7:99]
    assert list(tmp_path.glob("*.partial")) == []


# S3


@pytest.fixture(scope="module")
def s3(packed: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of moto's server with the shards in bucket/shards."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    pytest.importorskip("moto", reason="pip install 'moto[server]'")
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        _await(port)
        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
        client.create_bucket(Bucket="bucket")
        for path in Path(packed.root).iterdir():
            client.upload_file(str(path), "bucket", f"shards/{path.name}")
        yield port
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """through(port) makes that the endpoint of S3's clients."""

    def use(port: int) -> None:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(("workers", "cached"), [(0, False), (2, True)])
def test_an_epoch_over_s3_with_faults_is_that_of_local_files(
    s3, packed, make_reader, through, tmp_path, workers, cached
):
    expected, _ = batches(packed)
    with FaultProxy(s3, storm(5, 0.2, ("reset", "cut", "stall", "503"))) as proxy:
        through(proxy.port)
        reader = make_reader(cache=str(tmp_path) if cached else None, read_timeout=1.0)
        found, stream = batches(open_manifest("s3://bucket/shards", reader), workers=workers)
    assert_same(found, expected)
    assert stream.reads["read_retries"] > 0
    whole = sum(shard.bytes for shard in packed.shards)
    assert stream.reads["read_bytes"] == (whole if cached else sum(packed.locate(i)[2] for i in range(60)) * 2)


def test_s3_goes_on_at_the_piece_it_has_reached(s3, packed, make_reader, through, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE", 40_000)
    content = content_of(packed)
    with FaultProxy(s3, ["", "", "", "503", "", "stall", "503"]) as proxy:
        through(proxy.port)
        reader = make_reader(read_timeout=1.0)
        url = f"s3://bucket/shards/{packed.shards[0].name}"
        assert b"".join(reader.blocks(url, 1000, len(content), size=len(content))) == content[1000:]
    assert reader.counters["read_bytes"] == len(content) - 1000
    assert reader.counters["read_retries"] == 3 and reader.counters["read_stalls"] == 1


def test_s3_objects_that_are_missing_or_of_another_size_are_refused(s3, packed, make_reader, through):
    through(s3)
    size = packed.shards[0].bytes
    with pytest.raises(ReadError, match=r"s3://bucket/shards/none.tar .* after 1 attempt\(s\): FileNotFoundError"):
        make_reader().read("s3://bucket/shards/none.tar", 0, 5, size=5)
    with pytest.raises(ReadError, match=f"has {size} bytes, not {size + 1}"):
        make_reader().read(f"s3://bucket/shards/{packed.shards[0].name}", 0, 5, size=size + 1)


# Training


@pytest.mark.long
@nginx_only
def test_a_training_through_a_storm_of_faults_has_the_losses_of_local_files(nginx, packed, tmp_path):
    """Two ranks, each with a loading process, and a cache that they share."""
    settings = ["steps=9", "epochs=null", "global_batch=20", "micro_batch=10", "precision=fp32", "log_every=1"]
    local = run(tmp_path / "local", f"data.train={packed.root}", *settings, ranks=2)
    faults = storm(11, 0.5, ("reset", "cut", "503", "429", "length", "page"))
    with FaultProxy(nginx, faults, seed=1) as proxy:
        source = [f"data.train=http://127.0.0.1:{proxy.port}", f"data.cache={tmp_path / 'cache'}"]
        remote = run(tmp_path / "remote", *source, *settings, ranks=2)
    assert remote.returncode == 0, remote.output
    assert remote.losses() == local.losses() and len(remote.losses()) == 9
    counted = [line for line in remote.record() if line["event"] == "train"]
    whole = sum(shard.bytes for shard in packed.shards)
    assert 0 < sum(line["read_bytes"] for line in counted) <= whole
    assert sum(line["read_retries"] for line in counted) > 0
    assert sum(proxy.seen.values()) - proxy.seen[""] > 3
