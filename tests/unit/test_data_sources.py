"""Commands as sources, the cache's limit, and what is refused. Networks: tests/integration/test_data_faults.py."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.registry  # noqa: F401  # the module, which the package hides behind a mapping of the same name
import numpy as np
import pytest

from swinv2_scale.data import cache, sources
from swinv2_scale.data.cache import Cache
from swinv2_scale.data.folder import one_file
from swinv2_scale.data.manifest import MANIFEST_NAME, open_manifest
from swinv2_scale.data.pack import write_shards
from swinv2_scale.data.shards import read_sample, verify
from swinv2_scale.data.sources import Reader, ReadError, is_url, join, shown

CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.002)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "it's a shard.tar"
    path.write_bytes(CONTENT)
    return path


def make_reader(**changes: Any) -> Reader:
    settings = {"cache": None, "cache_gigabytes": 1.0, "retries": 3, "connect_timeout": 5.0, "read_timeout": 5.0}
    return Reader(**{**settings, **changes})


@pytest.mark.parametrize(
    ("source", "yes"),
    [
        ("pipe:cat /d/{}", True),
        ("s3://bucket/d", True),
        ("https://host/d", True),
        ("/d/shards", False),
        ("shards", False),
        ("a:b/shards", False),
        ("C:\\shards", False),
    ],
)
def test_urls_are_told_from_paths(source: str, yes: bool) -> None:
    assert is_url(source) is yes


def test_names_are_joined_as_the_scheme_wants() -> None:
    assert join("https://host/d/?token=a", "train/a b.tar") == "https://host/d/train/a%20b.tar?token=a"
    assert join("s3://bucket/d/", "a b.tar") == "s3://bucket/d/a b.tar"
    assert join("pipe:ssh host cat /d/{} | tee log", "it's.tar") == "pipe:ssh host cat /d/'it'\"'\"'s.tar' | tee log"
    assert join("pipe:cat /d", "a.tar") == "pipe:cat /d/a.tar"


def test_messages_hold_no_secrets() -> None:
    assert shown("https://me:secret@host:8080/d/a.tar?X-Signature=secret#x") == "https://host:8080/d/a.tar"


# Commands


def test_a_command_gives_any_range(file: Path) -> None:
    reader = make_reader()
    url = join(f"pipe:cat {file.parent}/{{}}", file.name)
    random = np.random.default_rng(1)
    for _ in range(5):
        start, end = sorted(random.integers(0, len(CONTENT), 2).tolist())
        assert reader.read(url, start, end, size=len(CONTENT)) == CONTENT[start:end]
        assert reader.take_counters() == {"read_bytes": end - start, "skipped_bytes": start}
    assert reader.read_all(url) == CONTENT


def test_a_command_that_breaks_goes_on_at_the_byte_it_has_reached(file: Path, tmp_path: Path) -> None:
    broken = f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; head -c 1200000 '{tmp_path}/'*.tar; exit 3; }}; "
    reader = make_reader()
    url = f"pipe:{broken} cat '{tmp_path}/'*.tar"
    assert reader.read(url, 100, len(CONTENT), size=len(CONTENT)) == CONTENT[100:]
    assert reader.counters["read_retries"] == 1
    assert reader.counters["read_bytes"] == len(CONTENT) - 100


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(
        ReadError, match=r"byte 7 on, after 4 attempt\(s\): the command ended at byte 3 with code 9: no"
    ):
        make_reader().read("pipe:printf abc; echo no such bucket >&2; exit 9", 7, 20, size=20)


def test_a_command_that_stalls_is_ended_with_its_children(tmp_path: Path) -> None:
    reader = make_reader(read_timeout=0.2, retries=1)
    with pytest.raises(ReadError, match=r"the command gave nothing for 0.2 s \(data.read_timeout\)"):
        reader.read(f"pipe:sh -c 'echo $$ >> {tmp_path}/pids; sleep 600'; true", 0, 5, size=5)
    assert reader.counters["read_stalls"] == 2
    pids = (tmp_path / "pids").read_text().split()
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("other", [-512, 512])
def test_a_command_that_gives_another_length_is_refused(file: Path, other: int) -> None:
    size = len(CONTENT) + other
    with pytest.raises(ReadError, match=r"bytes early|changed or truncated"):
        make_reader(retries=1).read(f"pipe:cat {file.parent}/*.tar", 0, size, size=size)


def test_shards_behind_a_command_are_those_of_the_directory(tmp_path: Path) -> None:
    items = [one_file(f"k{i:02d}", "bin", i, bytes([i]) * 1000) for i in range(20)]
    (tmp_path / "packed").mkdir()
    local = write_shards(items, tmp_path / "packed", classes=[], shard_size=5, seed=0, origin={})
    for settings in ({}, {"cache": str(tmp_path / "cache")}):
        remote = open_manifest(f"pipe:cat {local.root}/{{}}", make_reader(**settings))
        assert remote.hash == local.hash
        assert [read_sample(remote, i) for i in range(20)] == [read_sample(local, i) for i in range(20)]
    (tmp_path / "packed" / local.shards[0].name).write_bytes(bytes(local.shards[0].bytes))
    assert "contents differ" in verify(open_manifest(f"pipe:cat {local.root}/{{}}", make_reader()))[0]


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("<html>")
    with pytest.raises(ValueError, match="is no manifest of shards"):
        open_manifest(f"pipe:cat {tmp_path}/{{}}", make_reader())


# The cache


def blocks(size: int) -> Iterator[bytes]:
    yield from (b"x" * 1000 for _ in range(size // 1000))


def name(number: int) -> str:
    return f"{number:064x}"


def test_what_was_not_read_for_longest_leaves_the_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(bytes(9_000))  # somebody's file
    store = Cache(tmp_path, 10_000)
    for number in range(3):
        assert store.fill(name(number), 3_000, blocks(3_000), "")
    assert store.read(name(0), 5, 8, 3_000) == b"xxx"
    assert store.fill(name(3), 3_000, blocks(3_000), "")
    assert [store.read(name(number), 0, 1, 3_000) is not None for number in range(4)] == [True, False, True, True]
    assert (tmp_path / "notes.txt").exists()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) - 9_000 <= 10_000


def test_a_shard_larger_than_the_cache_is_read_past_it(file: Path, tmp_path: Path, caplog) -> None:
    cache._warn.cache_clear()
    reader = make_reader(cache=str(tmp_path / "small"), cache_gigabytes=0.001)
    for _ in range(2):
        assert reader.read(f"pipe:cat {tmp_path}/*.tar", 10, 20, size=len(CONTENT)) == CONTENT[10:20]
    assert [record.message for record in caplog.records if "data.cache_gigabytes" in record.message] == [
        f"no room in the cache {tmp_path / 'small'} for a shard of 0.003 GB, its limit is 0.001 GB "
        "(data.cache_gigabytes): read without it"
    ]


def test_an_entry_that_was_written_into_is_not_served(tmp_path: Path) -> None:
    store = Cache(tmp_path, 10_000)
    store.fill(name(1), 3_000, blocks(3_000), "")
    with (tmp_path / name(1)).open("r+b") as entry:
        entry.write(b"y")
    assert store.read(name(1), 0, 1, 3_000) is None
    assert store.read(name(2), 0, 1, 3_000) is None
    assert store.fill(name(1), 3_000, blocks(3_000), "")
    assert store.read(name(1), 0, 1, 3_000) == b"x"


def test_a_fill_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[bytes]:
        yield b"x" * 1000
        raise RuntimeError("cable")

    store = Cache(tmp_path, 10_000)
    with pytest.raises(RuntimeError, match="cable"):
        store.fill(name(1), 3_000, breaking(), "")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# What is refused at the start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_timeout": 0.0}, "data.read_timeout is 0.0 seconds; choose more than 0"),
        ({"connect_timeout": -1.0}, "data.connect_timeout is -1.0 seconds"),
        ({"retries": -1}, "data.retries is -1; choose 0 or more"),
        ({"cache": "/dev/null/cache"}, "data.cache=/dev/null/cache cannot be written"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reader(**changes)


def test_an_unknown_scheme_is_refused_at_once() -> None:
    with pytest.raises(ReadError, match=r"after 1 attempt\(s\): .*gopher.*write file paths without a scheme"):
        make_reader().read("gopher://host/a.tar", 0, 5, size=5)


def test_a_missing_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for protocol in ("s3", "s3a"):  # which an earlier test may have loaded
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(ReadError, match=r"pip install 'swinv2-scale\[s3\]'"):
        make_reader().read("s3://bucket/a.tar", 0, 5, size=5)


def test_forked_readers_do_not_share_connections() -> None:
    reader = make_reader()
    session = reader._session
    reader._owner = os.getpid() + 1
    reader._attempt("pipe:true", 0, 1, sources._Object(1)).close()
    assert reader._session is not session
