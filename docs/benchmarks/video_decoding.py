"""Clips out of mp4 files in memory, ours beside PyAV's plain loop and torchcodec, which take the same frames.

    python docs/benchmarks/video_decoding.py
    python docs/benchmarks/video_decoding.py --rounds 9 --seconds 10 --size 340x256

8 frames of a photograph that drifts, H.264 with a key frame at every 250th frame (x264's default) and at every 25th,
spread over the video or 4 frames apart from its middle. One process and one thread each; medians of rounds in turn.
torchcodec's own loop is its get_frames_at, in exact mode, as one that must not miss a frame would use it.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import torch
from skimage.data import astronaut

from swinv2_scale.data.videos import EncodedVideo

Decoder = Callable[[bytes, list[int]], torch.Tensor]


def film(rows: int, columns: int, frames: int, keys: int) -> bytes:
    """An mp4 at 30 frames a second."""
    photograph, file = astronaut(), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": str(keys)})
        stream.height, stream.width, stream.pix_fmt = rows, columns, "yuv420p"
        for number in range(frames):
            y = round((512 - rows) * (0.5 + 0.4 * np.sin(number / 20)))
            x = round((512 - columns) * (0.5 + 0.4 * np.cos(number / 23)))
            pixels = np.ascontiguousarray(photograph[y : y + rows, x : x + columns])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def ours(content: bytes, numbers: list[int]) -> torch.Tensor:
    return EncodedVideo(content).frames(numbers)


def plain_loop(content: bytes, numbers: list[int]) -> torch.Tensor:
    """Decode all up to the last frame that is wanted, make pixels of those that are."""
    found = []
    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                found.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0))
            if number == numbers[-1]:
                break
    return torch.stack(found)


def whole_video(content: bytes, numbers: list[int]) -> torch.Tensor:
    """All frames as pixels, then a choice: torchvision's read_video, which newer releases do not have any more."""
    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack([frames[number] for number in numbers])).movedim(-1, 1)


def torchcodec_frames(content: bytes, numbers: list[int]) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(content, num_ffmpeg_threads=1).get_frames_at(numbers).data


def decoders() -> dict[str, Decoder]:
    """By name; torchcodec only where it finds FFmpeg."""
    found: dict[str, Decoder] = {"ours": ours, "PyAV, plain loop": plain_loop, "PyAV, whole video": whole_video}
    try:
        torchcodec_frames(film(64, 64, 10, 5), [0])
    except (ImportError, RuntimeError) as error:
        print(f"without torchcodec: {str(error).splitlines()[0]}")
    else:
        found["torchcodec"] = torchcodec_frames
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of a video")
    parser.add_argument("--size", default="340x256", help="columns x rows, at most 512")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns, rows = map(int, arguments.size.split("x"))
    frames = 30 * arguments.seconds
    found = decoders()
    print(f"| key frame every | frames | {' | '.join(f'{name}, ms' for name in found)} | ours over the others |")
    print("|---|---|" + "---|" * (len(found) + 1), flush=True)
    for keys in (250, 25):
        content = film(rows, columns, frames, keys)
        for label, numbers in {
            "spread": [round((n + 0.5) * frames / 8) for n in range(8)],
            "4 apart": [frames // 2 + 4 * n for n in range(8)],
        }.items():
            seconds: dict[str, list[float]] = {name: [] for name in found}
            expected = plain_loop(content, numbers)
            for _ in range(arguments.rounds):
                for name, decode in found.items():
                    begin = time.perf_counter()
                    clip = decode(content, numbers)
                    seconds[name].append(time.perf_counter() - begin)
                    assert torch.equal(clip, expected), name
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            cells = " | ".join(f"{1e3 * value:.1f}" for value in medians.values())
            ratios = ", ".join(f"{value / medians['ours']:.2f}×" for name, value in medians.items() if name != "ours")
            print(f"| {keys} | {label} | {cells} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
