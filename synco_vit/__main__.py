"""The installed commands: ``synco-pretrain ...``, which is ``python -m synco_vit pretrain ...``."""

import importlib
import sys
from pathlib import Path

from synco_vit.own import CODE

COMMANDS = {
    "pretrain": "main_pretrain",
    "knn": "eval_knn",
    "linear": "eval_linear",
    "retrieval": "eval_retrieval",
    "video": "eval_video_seg",
    "check-data": "tools.check_data",
    "export": "tools.export_backbone",
    "report": "tools.report",
}


def main() -> None:
    """Run the command that the program is called after, else the one of the first argument.

    The modules of the project have names that others use too, such as ``utils``. So they lie in
    a folder of their own, which only a process that runs a command has on its path.
    """
    command = Path(sys.argv[0]).name.removeprefix("synco-")
    if command not in COMMANDS:
        command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    tool = command.startswith("tools.") and command.removeprefix("tools.").isidentifier()
    if not (tool or command in COMMANDS):
        sys.exit(f"usage: python -m synco_vit {{{','.join(COMMANDS)},tools.NAME}} ...")
    sys.argv[0] = command if tool else f"synco-{command}"
    sys.path.insert(0, str(CODE))
    try:
        module = importlib.import_module(COMMANDS.get(command, command))
    except ModuleNotFoundError as error:
        if error.name != command:
            raise
        sys.exit(f"synco_vit: no such tool, {command}")
    from utils.run import run_script

    run_script(module.main)


if __name__ == "__main__":
    main()
