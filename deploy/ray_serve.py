"""`unmask serve` on Ray Serve: replicas of the server behind one address, as many as the load asks for.

    pip install 'unmask[ray]'
    serve run deploy.ray_serve:app model=out/mine max_replicas=4          # http://127.0.0.1:8000/v1
    UNMASK_API_KEY=... serve run deploy.ray_serve:app model=out/mine

Every replica is the whole server (`create_app`): the same paths, streams and errors. A replica that is no longer needed gets no
new request and has `grace` seconds to finish those it has.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from pydantic import BaseModel, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application

import unmask
from unmask.serve.app import create_app
from unmask.serve.config import ServerConfig


class Settings(BaseModel, extra="forbid"):
    """What `serve run` takes as NAME=VALUE.

    Attributes:
        model: folder, Hugging Face id or embedded model; found on every node.
        name: that clients use; empty: the model.
        quantize: weights that decode, as of `unmask serve`.
        min_replicas: that always run.
        max_replicas: at most.
        max_concurrent: completions that a replica decodes together; with so many requests on average, another one is started.
        cpus: that a replica reserves and computes with.
        gpus: that a replica reserves.
        grace: seconds that a replica has to finish its requests.
    """

    model: str = "smollm2-135m-diffusion"
    name: str = ""
    quantize: str = "auto"
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    max_concurrent: PositiveInt = 16
    cpus: PositiveFloat = 1.0
    gpus: float = 0.0
    grace: PositiveFloat = 60.0


def app(settings: Settings) -> Application:
    """The application that `serve run` starts."""
    key = os.environ.get("UNMASK_API_KEY")
    config = ServerConfig(
        names=(settings.name or settings.model,),
        api_keys=() if key is None else (key,),
        max_concurrent=settings.max_concurrent,
    )

    def build() -> FastAPI:
        device = "cuda" if settings.gpus else "cpu"
        model = unmask.load(settings.model, device=device, quantize=settings.quantize)
        return create_app(model, config, loopback=False)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="unmask",
        # Beyond what is decoded together, a replica holds as many that wait, so that it never idles.
        max_ongoing_requests=2 * settings.max_concurrent,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_concurrent,
        },
        graceful_shutdown_timeout_s=settings.grace,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind()
