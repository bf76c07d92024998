"""A worker for tests of gateways: a tiny model that takes its time, the same in every process.

python gateway_worker.py PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from live import NAME, served_model

from unmask.serve.config import ServerConfig
from unmask.serve.server import listen, run

SECONDS = 0.05
"""Of a forward."""

if __name__ == "__main__":
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir()
    model = served_model(folder, seconds=SECONDS)
    run(model, ServerConfig(names=(NAME,), max_concurrent=4), listen("127.0.0.1", port), loopback=True)
