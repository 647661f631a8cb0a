"""The installed commands: ``synco-pretrain ...``, which is ``python -m synco_vit pretrain ...``."""

import ast
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
    "embed": "tools.embed",
    "check-data": "tools.check_data",
    "export": "tools.export_backbone",
    "report": "tools.report",
}
USAGE = f"usage: python -m synco_vit {{{','.join(COMMANDS)},tools.NAME}} ..."


def main() -> None:
    """Run the command that the program is called after, else the one of the first argument.

    The modules of the project have names that others use too, such as ``utils``. So they lie in
    a folder of their own, which only a process that runs a command has on its path.
    """
    command = Path(sys.argv[0]).name.removeprefix("synco-")
    if command not in COMMANDS:
        command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    modules = COMMANDS | tools()
    if command in ("-h", "--help"):
        about = [f"  {name:<27}{purpose(module)}" for name, module in modules.items()]
        print(USAGE, *about, "COMMAND --help lists its flags.", sep="\n")
        return
    if command not in modules:
        sys.exit(f"synco_vit: no such tool, {command}" if command.startswith("tools.") else USAGE)
    sys.argv[0] = f"synco-{command}" if command in COMMANDS else command
    sys.path.insert(0, str(CODE))
    module = importlib.import_module(modules[command])
    from utils.run import run_script  # of the code's own folder

    run_script(module.main)


def tools() -> dict[str, str]:
    """The modules of the tools that are commands, by their names."""
    found = {f"tools.{path.stem}": path for path in sorted(CODE.glob("tools/*.py"))}
    commands = {name: name for name, path in found.items() if "\ndef main()" in path.read_text()}
    return commands | {"tools.benchmark": "tools.benchmark.__main__"}


def purpose(module: str) -> str:
    """The first line of a module's docstring."""
    path = CODE / f"{module.replace('.', '/')}.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


if __name__ == "__main__":
    main()
