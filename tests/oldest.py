"""Prints the oldest versions that setup.py allows, as `pip install` takes them: NAME==VERSION for each NAME>=VERSION of
those that a run needs. `make test-oldest` installs them; those that are named on the command line are left out.
"""

import ast
import sys
from pathlib import Path


def main() -> None:
    """The command."""
    tree = ast.parse((Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    lists = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "install_requires"]
    for requirement in ast.literal_eval(lists[0]):
        name, bound, version = requirement.partition(">=")
        if not bound:
            sys.exit(f"setup.py: {requirement}: expected the oldest version that it works with, as {requirement}>=1.2")
        if name not in sys.argv[1:]:
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
