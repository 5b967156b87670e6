"""Encoded videos, of which only the frames that are asked for become pixels. The only module that imports PyAV.

PyAV brings FFmpeg with it. Against torchcodec, which wants FFmpeg's libraries installed, see
docs/benchmarks/video_decoding.py.
"""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch

from swinv2_scale.data.images import CorruptSampleError

_TICKS = 12800  # a second, in what `encode` writes


class EncodedVideo:
    """A video file's bytes, in any container and codec that FFmpeg knows; of several video streams the first.

    Frames are numbered as they are shown, and stand as they are shown: what the file says of a rotation is done. The
    methods raise CorruptSampleError for what is no video, is cut short, or does not decode.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    @cached_property
    def times(self) -> np.ndarray:
        """float64 (N,): when each frame begins to be shown, in seconds after the first one. Nothing is decoded."""
        return (self._shown - self._shown[0]) * float(self._opened[1].time_base)

    def frames(self, numbers: Sequence[int]) -> torch.Tensor:
        """The frames of these numbers, in their order, with repetitions: uint8 (T, 3, Y, X)."""
        wanted = sorted({int(self._shown[number]) for number in numbers})
        pixels: dict[int, torch.Tensor] = {}
        try:
            while wanted:
                for frame in self._decoded(wanted[0]):
                    if frame.pts < wanted[0]:
                        continue
                    while wanted and frame.pts >= wanted[0]:
                        pixels[wanted.pop(0)] = _upright(frame)
                    # Where there is a key frame before the next one, to seek it is less work than to decode up to it.
                    if not wanted or self._key(wanted[0]) > self._key(frame.pts):
                        break
                else:
                    raise EOFError(f"it ends before its frame at {wanted[0]} of {self._shown[-1]}")
        except Exception as error:  # FFmpeg's errors are of many kinds
            raise CorruptSampleError(f"video does not decode ({error})") from error
        return torch.stack([pixels[int(self._shown[number])] for number in numbers])

    def check(self) -> tuple[int, int]:
        """(Y, X) of a video that decodes to its end."""
        first, last = int(self._shown[0]), None
        try:
            for last in self._decoded(first):  # noqa: B007  # all are decoded, one is looked at
                pass
            if last is None:
                raise EOFError("it has no frame")
        except Exception as error:
            raise CorruptSampleError(f"video does not decode ({error})") from error
        _, height, width = _upright(last).shape
        return height, width

    def _decoded(self, stamp: int) -> Iterator[Any]:
        """PyAV's frames, from the key frame before a time stamp on."""
        container, stream = self._opened
        if container.format.name != "avi":
            container.seek(int(self._keys[self._key(stamp)]), stream=stream)
            yield from container.decode(stream)
            return
        del self._opened  # AVI stores no time of showing, and FFmpeg's guesses are wrong: from its first frame, counted
        container, stream = self._opened
        for shown, frame in zip(self._shown, container.decode(stream), strict=False):
            frame.pts = int(shown)
            yield frame

    def _key(self, stamp: int) -> int:
        """Which of the key frames is the last before a time stamp; of those before all, the first."""
        return max(0, int(np.searchsorted(self._keys, stamp, side="right")) - 1)

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        """PyAV's container and stream."""
        av = _av()
        try:
            container = av.open(io.BytesIO(self.content))
            stream = container.streams.video[0]
        except IndexError as error:
            raise CorruptSampleError("video file without a video stream") from error
        except Exception as error:
            raise CorruptSampleError(f"video does not open ({error})") from error
        stream.thread_count = 1  # there is a process for each core already
        return container, stream

    @cached_property
    def _packets(self) -> np.ndarray:
        """int64 (N, 2) of the frames in the file's order: when shown, and whether decoding can begin with it."""
        container, stream = self._opened
        packets = []
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise EOFError("it is cut short")
                if packet.pts is not None and not packet.is_discard:  # the last one is empty
                    packets.append((packet.pts, packet.is_keyframe))
            if not packets:
                raise EOFError("it has no frame")
        except Exception as error:
            raise CorruptSampleError(f"video does not decode ({error})") from error
        return np.array(packets, np.int64)

    @cached_property
    def _shown(self) -> np.ndarray:
        """int64 (N,): the time stamp of each frame, in the stream's unit, ascending."""
        return np.sort(self._packets[:, 0])

    @cached_property
    def _keys(self) -> np.ndarray:
        """int64: the time stamps of the frames that decoding can begin with, ascending."""
        keys = self._packets[self._packets[:, 1] > 0, 0]
        return np.sort(keys) if len(keys) and self._opened[0].format.name != "avi" else self._shown[:1]


def encode(frames: np.ndarray, times: Sequence[float], *, rotation: int = 0) -> bytes:
    """An mp4 of uint8 (T, Y, X, 3), Y and X even, shown at `times` (seconds): H.264, or MPEG-4 where FFmpeg lacks that.

    rotation: degrees by which a player shall turn it, clockwise; the frames are stored as they are.
    """
    av = _av()
    file = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1"} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, _TICKS)
        stream.codec_context.time_base = Fraction(1, _TICKS)
        if rotation:
            stream.set_display_rotation(-rotation)
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(time * _TICKS), Fraction(1, _TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _upright(frame: Any) -> torch.Tensor:
    """uint8 (3, Y, X)"""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
    return torch.rot90(pixels, frame.rotation // 90, (1, 2)) if frame.rotation else pixels


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"videos are read by a package that is not installed ({error}); `pip install 'swinv2-scale[video]'`"
        ) from error
    return av
