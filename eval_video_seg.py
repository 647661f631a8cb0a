"""Judge an encoder by video object segmentation on DAVIS 2017.

    python eval_video_seg.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA is the folder of DAVIS 2017, which holds ImageSets/, JPEGImages/ and Annotations/.
"""

import argparse
import csv
import os
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from data.dataset import to_tensor
from data.davis import MULTIPLE, Video, fit_frame, read_frame, read_mask, read_videos, write_mask
from data.loader import normalize
from evaluation.identity import as_flags, identified, identity
from evaluation.label_propagation import LabelPropagation
from evaluation.of_run import log_notes, parse_evaluation
from evaluation.video_metrics import contour_accuracy, region_similarity, statistics
from models.encoder import Backbone
from models.patch_features import STRIDE, patch_features, patch_stride
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import TRAINING, number_in
from utils.config import NETWORK, run_folder
from utils.distributed import all_gather_objects, on_terminal, rank, world_size
from utils.errors import UserError
from utils.provenance import describe_images
from utils.run import Run, log_table, run_script, start, write_pictures, write_results

METRICS = {"J": region_similarity, "F": contour_accuracy}
STATISTICS = ("Mean", "Recall", "Decay")
# of each object of a video by its name: each of METRICS in the frames that count
Curves = dict[str, dict[str, list[float]]]
PROTOCOL = ("n_last_frames", "size_mask_neighborhood", "topk", "short_side")  # flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    for flag, least, default, about in (
        ("--n-last-frames", 0, 7, "frames of the context beside the first"),
        ("--size-mask-neighborhood", 0, 12, "patches that a label may move each way, 0 for any"),
        ("--topk", 1, 5, "patches that a patch takes its label from"),
    ):
        parser.add_argument(flag, type=number_in(least, 10**9), default=default, help=about)
    parser.add_argument("--short-side", type=int, default=480, help="of a frame in pixels")
    parser.add_argument(
        "--pictures",
        "--overlay",  # its old name
        action="store_true",
        help="draw the masks over the frames, a film of each video, and J&F over time",
    )


def main() -> None:
    """Segment this process's videos, gather the scores, write the figures."""
    args, config, notes = parse_evaluation(__doc__, add_arguments, TRAINING)
    if args.short_side < MULTIPLE or args.short_side % STRIDE:
        raise UserError(f"--short-side must be a multiple of {STRIDE}, at least {MULTIPLE}")
    run = start(config, os.path.join(run_folder(config), "video_segmentation_davis2017"))
    log_notes(run, notes)
    videos = read_videos(config.DATA.DATA_PATH)
    encoder, origin = load_pretrained_encoder(args, config, run)
    frames = [frame for video in videos for frame in video.frames]
    data = describe_images(config.DATA.DATA_PATH, frames=(frames, []))
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    of = identity(run, config, NETWORK, origin, data, **as_flags(protocol))
    provenance = identified(run, origin, data, of)

    own = {}
    mine = videos[rank() :: world_size()]
    total = sum(len(video.frames) for video in mine)
    with tqdm(total=total, unit="frame", disable=not on_terminal(), leave=False) as bar:
        for video in mine:
            bar.set_description(video.name)
            own[video.name] = segment(video, encoder, run, args, bar)
            for name, scores in summarize(own[video.name]).items():
                run.logger.info("%s: J %.4f F %.4f", name, scores["J-Mean"], scores["F-Mean"])
    gathered = all_gather_objects(own)
    if rank() == 0:
        found = {name: curves for part in gathered for name, curves in part.items()}
        scored = {video.name: found[video.name] for video in videos}  # in the order of the list
        per_object = {k: v for curves in scored.values() for k, v in summarize(curves).items()}
        report(per_object, {"protocol": protocol}, provenance, run)
        if args.pictures:
            write_pictures(run, partial(draw, videos, scored, run.folder))


@torch.inference_mode()
def segment(
    video: Video, encoder: Backbone, run: Run, args: argparse.Namespace, bar: tqdm
) -> Curves:
    """Carry the first mask through a video and write the masks of all frames.

    Args:
        video: frames, and annotations to judge by.
        encoder, run: what encodes the frames, and on which device.
        args: the flags of ``PROTOCOL``.
        bar: counts the frames.

    Returns:
        for each object of the first frame its J and F in each frame but the first and the last;
        none in a video of less than 3 frames.
    """
    frame = read_frame(video.frames[0])
    shape = frame.shape[:2]
    mask = read_mask(video.annotations[0], shape)
    patch = patch_stride(encoder)
    fitted = fit_frame(frame, args.short_side, patch)
    features = encode(encoder, fitted, run)
    height, width, _ = features.shape
    propagation = LabelPropagation(
        features,
        one_hot(mask, (height, width)).to(run.device),
        args.n_last_frames,
        args.size_mask_neighborhood or None,
        args.topk,
    )
    write(video, 0, mask, run)
    bar.update()
    objects = [int(number) for number in np.unique(mask) if number]  # their numbers may have gaps
    values: dict[int, dict[str, list[float]]]
    values = {number: {name: [] for name in METRICS} for number in objects}
    for i in range(1, len(video.frames)):
        frame = read_frame(video.frames[i])
        if frame.shape[:2] != shape:
            raise UserError(f"{video.frames[i]}: the frame has another size than the video's first")
        truth = read_mask(video.annotations[i], shape)
        labels = propagation.step(encode(encoder, fit_frame(frame, args.short_side, patch), run))
        mask = decide(labels, fitted.shape[:2], shape)
        write(video, i, mask, run)
        bar.update()
        if i == len(video.frames) - 1:
            break  # neither the first nor the last frame counts
        for number in objects:
            for name, metric in METRICS.items():
                values[number][name].append(metric(truth == number, mask == number))
    if len(video.frames) < 3 or not objects:
        run.logger.warning("%s: nothing to score (no third frame, or no object)", video.name)
        return {}
    return {f"{video.name}_{number}": values[number] for number in objects}


def summarize(curves: Curves) -> dict[str, dict[str, float]]:
    """The statistics of J and F over the frames of each object."""
    return {
        name: {
            f"{metric}-{statistic}": figure
            for metric in METRICS
            for statistic, figure in zip(STATISTICS, statistics(of_object[metric]), strict=True)
        }
        for name, of_object in curves.items()
    }


def encode(encoder: Backbone, frame: np.ndarray, run: Run) -> torch.Tensor:
    """A frame, H x W x 3 of uint8 -> patch features, (h, w, C) in float32."""
    with run.precision.autocast():
        features = patch_features(encoder, normalize(to_tensor(frame)[None].to(run.device)))
    return features[0].float()


def one_hot(mask: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Objects by pixel -> labels of patches, (h, w, 1 + objects), the nearest pixel's."""
    small = Image.fromarray(mask).resize(grid[::-1], Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(small)).long()
    return F.one_hot(labels, int(mask.max()) + 1).float()


def decide(labels: torch.Tensor, fitted: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Soft labels of patches -> objects by pixel.

    Args:
        labels: (h, w, K).
        fitted: height and width of the frame that was encoded, at which objects are decided.
        shape: height and width of the result.

    Returns:
        H x W of uint8.
    """
    scores = F.interpolate(labels.permute(2, 0, 1)[None], fitted, mode="bilinear")[0]
    # each object on its own scale, so that small ones can win; one that is everywhere or nowhere
    # has no scale and stays
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    scores = torch.where(high > low, (scores - low) / (high - low), scores)
    objects = scores.argmax(0).to(torch.uint8).cpu().numpy()
    return np.array(Image.fromarray(objects).resize(shape[::-1], Image.Resampling.NEAREST))


def write(video: Video, number: int, mask: np.ndarray, run: Run) -> None:
    """Write the mask of frame ``number`` as the official toolkit reads it."""
    path = frame_path(os.path.join(run.folder, "masks"), video, number, "png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_mask(path, mask)


def frame_path(folder: str, video: Video, number: int, ending: str) -> str:
    """Where something of frame ``number`` lies in ``folder``."""
    stem = os.path.splitext(os.path.basename(video.frames[number]))[0]
    return os.path.join(folder, video.name, f"{stem}.{ending}")


def draw(videos: list[Video], scored: dict[str, Curves], folder: str, pictures: str) -> None:
    """Draw what was segmented: ``overlay/`` beside ``masks/``, and films and curves.

    Args:
        videos: all of them.
        scored: J and F by the video's name.
        folder: holds the masks.
        pictures: the folder of films and curves.
    """
    from evaluation.pictures import draw_scores, film, overlays, save  # few runs need matplotlib

    save(draw_scores(scored), os.path.join(pictures, "j_and_f.png"))
    masks, overlay = (os.path.join(folder, part) for part in ("masks", "overlay"))
    for video in videos:
        numbers = range(len(video.frames))
        of_masks = [frame_path(masks, video, number, "png") for number in numbers]
        of_overlay = [frame_path(overlay, video, number, "jpg") for number in numbers]
        os.makedirs(os.path.dirname(of_overlay[0]), exist_ok=True)
        overlays(video, of_masks, of_overlay)
        film(of_overlay, os.path.join(pictures, f"{video.name}.gif"))


def report(
    per_object: dict[str, dict[str, float]], also: dict, provenance: dict[str, Any], run: Run
) -> None:
    """Average over the objects; write results.json and per_object.csv."""
    if not per_object:
        raise UserError("nothing to score: no video has three frames and an object in the first")
    columns = [f"{name}-{statistic}" for name in METRICS for statistic in STATISTICS]
    means = {
        column: float(np.mean([scores[column] for scores in per_object.values()]))
        for column in columns
    }
    results = {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2} | means
    rows = [[m, *(f"{means[f'{m}-{name}']:.4f}" for name in STATISTICS)] for m in METRICS]
    rows.append(["J&F", f"{results['J&F-Mean']:.4f}", "", ""])
    log_table(run, [["", *STATISTICS], *rows])
    two = {
        name: {column: scores[column] for column in ("J-Mean", "F-Mean")}
        for name, scores in per_object.items()
    }
    write_results(run, {**results, "per_object": two, **also}, provenance)
    with open(os.path.join(run.folder, "per_object.csv"), "w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["object", *columns])
        writer.writerows([name, *scores.values()] for name, scores in per_object.items())


if __name__ == "__main__":
    run_script(main)
