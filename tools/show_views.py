"""Draw a sheet of random views of an image, as pre-training makes them.

python -m tools.show_views IMAGE --cfg FILE [--out FILE]
"""

import numpy as np
from PIL import Image

from data import opencv
from data.augmentation import Augmentation, ViewParameters, configured_views, draw_view
from data.image import read_file
from evaluation.pictures import Tile, grid, save
from utils.arguments import add_out, command_parser, number_in
from utils.config import load_config
from utils.errors import UserError
from utils.run import run_script


def main() -> None:
    """Draw the views, and write the sheet."""
    parser = command_parser(__doc__)
    parser.add_argument("image", help="an image file")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="its section AUG says how")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="override keys")
    parser.add_argument("--views", type=number_in(1, 50), default=6, help="of each kind")
    add_out(parser, "the picture (.png or .jpg)", "views.png")
    args = parser.parse_args()
    config = load_config(args.cfg, args.opts)
    try:
        kinds = configured_views(config.AUG)
    except ValueError as error:
        raise UserError(f"{args.cfg}: {error}") from error
    image = opencv.decode_array(read_file(args.image), args.image)
    size = config.DATA.IMG_SIZE
    rows = [[Tile(Image.fromarray(image), f"{image.shape[1]} x {image.shape[0]}")]]
    rows += [
        [draw(image, kind, size, (config.SEED, n, v)) for v in range(args.views)]
        for n, kind in enumerate(kinds)
    ]
    note = f"The image, then its views 1 and 2, {size} x {size} pixels; seed {config.SEED}."
    save(grid(rows, note), args.out)
    print(f"{args.out} written")


def draw(image: np.ndarray, kind: Augmentation, size: int, seed: tuple[int, ...]) -> Tile:
    """One view, size x size pixels, with what was done below it."""
    view = draw_view(np.random.default_rng(seed), image.shape[1], image.shape[0], kind)
    made = Image.fromarray(opencv.apply_view(image, view, size))
    return Tile(made, " ".join(done(view)) or "crop")


def done(view: ViewParameters) -> list[str]:
    """Words for what was drawn beside the crop."""
    words = {"flip": view.flip, "jitter": view.jitter, "grey": view.grey}
    words |= {f"blur {view.sigma:.1f}": view.sigma, "solarise": view.solarize}
    return [word for word, drawn in words.items() if drawn]


if __name__ == "__main__":
    run_script(main)
