"""Run the code blocks of a page in order, in this process: `python run_blocks.py blocks.json`.

Python blocks share one namespace, bash blocks are scripts of their own that stop at the first error.
"""

import json
import subprocess
import sys
from pathlib import Path


def main(file: str) -> None:
    namespace = {"__name__": "__main__"}
    for block in json.loads(Path(file).read_text(encoding="utf-8")):
        print(f"--- {block['page']}:{block['line']}", flush=True)
        if block["language"] == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], check=True, stdin=subprocess.DEVNULL)
        else:
            # Empty lines in front, so that a traceback has the line numbers of the page.
            exec(compile("\n" * block["line"] + block["code"], block["page"], "exec"), namespace)
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
