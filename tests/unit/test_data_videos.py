"""Videos: frames that are asked for are those of a whole decoding, whatever the file's rate, rotation and damage."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from swinv2_scale.data import motions, videos
from swinv2_scale.data.folder import one_file
from swinv2_scale.data.images import CorruptSampleError
from swinv2_scale.data.pack import pack, write_shards
from swinv2_scale.data.shards import filmed, read_sample, verify
from swinv2_scale.data.stream import evaluation_stream
from swinv2_scale.data.transforms import collate
from swinv2_scale.data.videos import EncodedVideo, encode

RATE = 25


def drifting(number: int, rows: int = 32, columns: int = 48) -> np.ndarray:
    """uint8 (T, Y, X, 3): a wave that moves, so that no two frames near each other are alike."""
    time, y, x = np.ogrid[:number, :rows, :columns]
    wave = 127 + 60 * np.sin(x / 5 + time / 3) + 60 * np.cos(y / 4 - time / 7)
    return np.repeat(wave[..., None], 3, axis=3).astype(np.uint8)


def plain_frames(content: bytes) -> torch.Tensor:
    with av.open(io.BytesIO(content)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return torch.from_numpy(frames).movedim(-1, 1)


@pytest.fixture(scope="module")
def film() -> bytes:
    """600 frames with three key frames or more, and frames that are stored in another order than shown."""
    return encode(drifting(600), np.arange(600) / RATE)


def test_frames_are_those_of_a_whole_decoding(film: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    video, whole = EncodedVideo(film), plain_frames(film)
    assert len(video._keys) >= 3 and not np.array_equal(video._packets[:, 0], video._shown)
    assert video.times == pytest.approx(np.arange(600) / RATE)
    converted = []
    upright = videos._upright
    monkeypatch.setattr(videos, "_upright", lambda frame: converted.append(frame) or upright(frame))
    numbers = [0, 599, 7, 7, 249, 250, 251, 500, 248]
    assert torch.equal(video.frames(numbers), whole[numbers])
    assert len(converted) == len(set(numbers))  # and no other becomes pixels
    for number in range(240, 260):  # around a key frame, each by a search of its own
        assert torch.equal(video.frames([number]), whole[[number]])
    assert video.check() == (32, 48)


@pytest.mark.parametrize(("container", "codec"), [("avi", "mpeg4"), ("avi", "libx264"), ("matroska", "libx264")])
def test_other_containers(container: str, codec: str) -> None:
    """AVI stores in which order frames are decoded, not when they are shown."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as target:
        stream = target.add_stream(codec, rate=RATE, options={"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.max_b_frames = 2
        for pixels in drifting(40):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(stream.encode())
    video, whole = EncodedVideo(file.getvalue()), plain_frames(file.getvalue())
    assert len(video.times) == len(whole) == 40 and len(video._keys) == (1 if container == "avi" else 4)
    assert torch.equal(video.frames([0, 39, 13]), whole[[0, 39, 13]])
    for number in range(40):
        assert torch.equal(video.frames([number]), whole[[number]]), number
    assert video.check() == (32, 48)


def test_variable_frame_rate_is_told_by_time_stamps() -> None:
    times = [0.0, 0.04, 0.08, 1.0, 1.5, 1.54]
    video = EncodedVideo(encode(drifting(6), times))
    assert video.times == pytest.approx(times)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotated_videos_stand_upright(degrees: int, turns: int) -> None:
    frames = drifting(3)
    plain, turned = EncodedVideo(encode(frames, [0, 1, 2])), EncodedVideo(encode(frames, [0, 1, 2], rotation=degrees))
    expected = torch.rot90(plain.frames([1]), turns, (2, 3))  # counterclockwise
    assert torch.equal(turned.frames([1]), expected)
    assert turned.check() == tuple(expected.shape[2:])


def fast_start(content: bytes, path: Path) -> bytes:
    """The same video with its index in front, so that a part of the file can be opened."""
    with av.open(io.BytesIO(content)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path.read_bytes()


def test_broken_videos_are_corrupt_samples(film: bytes, tmp_path: Path) -> None:
    for content in (b"", b"no video" * 99, film[: len(film) // 2]):
        with pytest.raises(CorruptSampleError, match="video does not open"):
            EncodedVideo(content).frames([0])
    whole = fast_start(film, tmp_path / "fast.mp4")
    assert torch.equal(EncodedVideo(whole).frames([300]), plain_frames(film)[[300]])
    with pytest.raises(CorruptSampleError, match="it is cut short"):
        EncodedVideo(whole[: len(whole) * 3 // 4]).frames([0])
    begin = whole.find(b"mdat")
    damaged = bytearray(whole)
    damaged[begin + 2000 : begin + 2600] = bytes(600)
    with pytest.raises(CorruptSampleError, match="video does not decode"):
        EncodedVideo(bytes(damaged)).check()


def test_a_file_without_a_picture_is_corrupt() -> None:
    sound = b"RIFF" + struct.pack("<I", 36 + 1600) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    with pytest.raises(CorruptSampleError, match="without a video stream"):
        EncodedVideo(sound + b"data" + struct.pack("<I", 1600) + bytes(1600)).frames([0])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, film: bytes) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'swinv2-scale\[video\]'") as caught:
        EncodedVideo(film).frames([0])
    assert not isinstance(caught.value, CorruptSampleError)  # or every video would be replaced by the next


def test_the_stream_replaces_a_broken_video(tmp_path: Path) -> None:
    films = [encode(drifting(3), [0, 1, 2]) for _ in range(4)]
    films[2] = films[2][:300]
    items = [one_file(f"film-{number}", "mp4", number, content) for number, content in enumerate(films)]
    manifest = write_shards(items, tmp_path, classes=list("abcd"), shard_size=4, seed=0, origin={"format": "kinetics"})
    stream = evaluation_stream(
        manifest,
        lambda sample: {**sample, "image": sample["image"].frames([0, 2])},
        collate,
        **{"seed": 0, "batch": 4, "rank": 0, "world_size": 1, "workers": 0, "max_corrupt_share": 0.5},
        open_sample=filmed,
    )
    (batch,) = stream
    assert batch["image"].shape == (4, 2, 3, 32, 48)
    (named,) = batch["corrupt"]
    assert "film-2: video does not open" in named
    (problem,) = verify(manifest)
    assert "film-2: video does not open" in problem
    with pytest.raises(CorruptSampleError, match=r"no video among its members \['jpg'\]"):
        filmed({"jpg": b""}, ())


def test_motions_are_genuine_videos_that_kinetics_packs(tmp_path: Path) -> None:
    motions.write_tree(tmp_path / "motions", {"training": 16, "validation": 8})
    manifest = pack(str(tmp_path / "motions/training.csv"), tmp_path / "out", format="kinetics", shard_size=8, seed=0)
    assert set(manifest.classes) == set(motions.MOTIONS)
    assert manifest.samples_per_class == dict.fromkeys(sorted(motions.MOTIONS), 2)
    assert verify(manifest) == []
    video = filmed(read_sample(manifest, 0)[1], manifest.classes)["image"]
    assert video.frames([0]).shape == (1, 3, motions.EDGE, motions.EDGE)
    assert video.times == pytest.approx(np.arange(motions.FRAMES) / motions.RATE, abs=1e-4)
    with pytest.raises(ValueError, match="holds videos already"):
        motions.write_tree(tmp_path / "motions")
    with pytest.raises(ValueError, match="no part 'test'; choose one of training, validation"):
        next(motions.videos("test"))


def test_opposite_motions_show_the_same_pictures_in_reverse() -> None:
    photograph = motions.Image.open(next(iter(motions.demo.photograph_files().values()))).convert("RGB")

    def film_of(name: str) -> np.ndarray:
        return motions._frames(motions.MOTIONS[name], photograph, None, np.random.default_rng(3))

    names = list(motions.MOTIONS)
    for one, other in zip(names[::2], names[1::2], strict=True):
        difference = film_of(one).astype(int) - film_of(other)[::-1]
        assert np.abs(difference).max() <= 1, one  # rounding
    left = film_of("moving left").astype(float)
    shift = round(motions._SHIFT)
    assert np.abs(left[0][:, shift:] - left[-1][:, :-shift]).mean() < 0.1 * np.abs(left[0] - left[-1]).mean()
