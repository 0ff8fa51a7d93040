"""A process that does jobs: one line of JSON in, lines of progress and one of the result out.

It ends with its standard input, so also with a parent that was killed: nothing goes on writing behind the next build.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import warnings

from data_tools.jobs import perform
from trainer.errors import UserError


def main() -> int:
    """Until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group: the parent's to answer
    warnings.simplefilter("ignore")  # Pillow's on odd metadata: what cannot be read is an error
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        job = json.loads(lines.get())
        try:
            _say({"result": perform(job, lambda count: _say({"done": count}))})
        except UserError as error:
            _say({"wrong": str(error)})
        except OSError as error:
            _say({"errno": error.errno, "text": error.strerror or str(error), "file": error.filename})


def _listen(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
