"""Forks runs of main_pretrain.py from a process that has imported everything already.

A run starts in a fraction of a second, and is a process of its own that can be killed. Reads one
JSON list a line, the log followed by the arguments; answers with the process id, then with the
exit code, negative for a signal.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    sys.path.insert(0, ROOT)
    import torch

    import main_pretrain
    from utils.run import run_script

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            run(lambda: run_script(main_pretrain.main), log, arguments)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(function, log: str, arguments: list[str]) -> None:
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.close(0)
        sys.argv = ["main_pretrain.py", *arguments]
        function()
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
