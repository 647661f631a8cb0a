"""Sort ImageNet's validation images, which lie in one folder, into a folder for each class.

The development kit (ILSVRC2012_devkit_t12.tar.gz, unpacked) says which class an image has.

    python -m tools.sort_val DATA/val ILSVRC2012_devkit_t12
"""

import os
import re

from data.imagenet import read_classes
from utils.arguments import command_parser
from utils.errors import UserError, reading
from utils.run import run_script

IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)


def main() -> None:
    """Read the classes, then move each image."""
    parser = command_parser(__doc__)
    parser.add_argument("val", help="the folder of ILSVRC2012_val_00000001.JPEG and so on")
    parser.add_argument("devkit", help="the folder ILSVRC2012_devkit_t12")
    args = parser.parse_args()
    classes = read_classes(args.devkit)
    with reading(args.val):
        names = sorted(os.listdir(args.val))
    images = [found for name in names if (found := IMAGE.fullmatch(name))]
    if not images:
        raise UserError(f"{args.val}: holds no ILSVRC2012_val_*.JPEG; are they sorted already?")
    for image in images:  # before any moves
        if not 1 <= int(image[1]) <= len(classes):
            raise UserError(f"{args.val}: {image[0]} is not among the {len(classes)} of the kit")
    for image in images:
        folder = os.path.join(args.val, classes[int(image[1]) - 1])
        os.makedirs(folder, exist_ok=True)
        os.rename(os.path.join(args.val, image[0]), os.path.join(folder, image[0]))
    print(f"{len(images)} images sorted into {args.val}")


if __name__ == "__main__":
    run_script(main)
