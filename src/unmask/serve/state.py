"""`AppState`: what the routes of one application share."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.serve.config import ServerConfig
from unmask.serve.metrics import Metrics
from unmask.serve.served_model import ServedModel
from unmask.serve.worker import Worker


@dataclass(frozen=True)
class AppState:
    """The model, the engine's worker, the metrics and the config of one application; kept at `app.state.unmask`."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    config: ServerConfig
