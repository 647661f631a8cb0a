"""Python runs this at its start where tests/mutate.py says so: a mutant takes its file's place.

So processes that a test starts run the mutant too.
"""

import importlib.machinery
import os

path, changed = os.environ["MUTANT"].split(os.pathsep)
load = importlib.machinery.SourceFileLoader.get_code


def get_code(self, name):
    if self.path != path:
        return load(self, name)
    with open(changed, encoding="utf-8") as file:
        return compile(file.read(), path, "exec")


importlib.machinery.SourceFileLoader.get_code = get_code
