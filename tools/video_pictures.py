"""What was segmented in videos: masks over the frames, films of them, and scores over time."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from data.davis import Video, draw_mask, palette, read_frame, read_mask
from data.image import read_rgb

LONGEST = 480  # pixels, of the longer side of a film
MILLISECONDS = 40  # a frame of a film; DAVIS has 24 a second, and GIF counts in hundredths
COLUMNS = 5  # of the sheet of scores


def overlays(video: Video, masks: list[str], paths: list[str]) -> None:
    """Draw the masks of a video over its frames.

    Args:
        video: of N frames.
        masks: their files, N.
        paths: the pictures to write, N.
    """
    for frame_path, mask_path, path in zip(video.frames, masks, paths, strict=True):
        frame = read_frame(frame_path)
        mask = read_mask(mask_path, frame.shape[:2])
        Image.fromarray(draw_mask(frame, mask)).save(path, quality=95)


def film(frames: list[str], path: str) -> None:
    """Write images of one size as an animated GIF that runs for ever, made smaller if need be."""

    def small(frame: str) -> Image.Image:
        image = read_rgb(frame)
        image.thumbnail((LONGEST, LONGEST))
        return image

    others = (small(frame) for frame in frames[1:])  # one at a time: they take memory
    small(frames[0]).save(path, save_all=True, append_images=others, duration=MILLISECONDS, loop=0)


def draw_scores(scored: dict[str, dict[str, dict[str, list[float]]]], path: str) -> None:
    """Draw the mean of J and F over the frames, a panel for each video, a line for each object.

    Objects have the colours of their masks.

    Args:
        scored: by the video's name, the object's name and ``J`` or ``F`` the frames that count,
            from the second on.
        path: of the picture.
    """
    panels = {name: objects for name, objects in scored.items() if objects}
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 2.1 * rows + 0.4), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (video, objects) in zip(all_axes, panels.items(), strict=False):
        means = []
        for number, curves in enumerate(objects.values(), 1):
            both = np.mean([curves["J"], curves["F"]], axis=0)
            axes.plot(range(1, len(both) + 1), both, color=palette()[number] / 255)
            means.append(both.mean())
        axes.set_title(f"{video}: {np.mean(means):.3f}", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("frame", fontsize=9)
    figure.supylabel("J&F", fontsize=9)
    figure.savefig(path)
