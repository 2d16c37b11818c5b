"""Pictures in a row as a film: MP4 with H.264, which every browser plays, by PyAV (`pip install 'gradine[video]'`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gradine.configs.schema import UserError


def write_video(frames: Iterable[np.ndarray], path: str | Path, fps: int = 10) -> Path:
    """Frames, uint8 [H, W, 3] in RGB of one size, as an MP4 file: written beside `path`, then renamed.

    An odd side is one pixel longer in the film, by its last row or column again, for H.264 halves the colours' sides.
    UserError without PyAV, for no frame, and for frames of several sizes.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{path} needs PyAV to be written. Install it: pip install 'gradine[video]'.") from None
    path, size = Path(path), None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as film:  # plays as it loads
            stream = film.add_stream("libx264", rate=fps, options={"crf": "18"})  # hardly to be told from the pictures
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                if size is None:
                    size = frame.shape
                    stream.height, stream.width = (side + side % 2 for side in size[:2])
                if frame.shape != size:
                    raise UserError(f"{path}: a frame is {[*frame.shape]}, the first one {[*size]}. Use one size.")
                even = np.pad(frame, [(0, side % 2) for side in size[:2]] + [(0, 0)], mode="edge")
                film.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            if size is None:
                raise UserError(f"{path} would have no frame. Give at least one.")
            film.mux(stream.encode())  # what the encoder still holds
        return partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
