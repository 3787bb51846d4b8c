"""What a user would write instead: timm behind FastAPI, as both document it."""

from __future__ import annotations

import io
import sys

import timm
import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from fastapi.responses import Response
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config


def make_app(model_name: str) -> FastAPI:
    """One model, one route for each kind of reply."""
    app = FastAPI()
    model = timm.create_model(model_name, features_only=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))

    def levels(data: bytes) -> list[torch.Tensor]:
        image = transform(Image.open(io.BytesIO(data)).convert("RGB"))
        with torch.inference_mode():
            found: list[torch.Tensor] = model(image[None])
        return found

    @app.post("/pooled")
    def pooled(image: UploadFile) -> list[float]:
        vector: list[float] = levels(image.file.read())[-1].mean((2, 3))[0].tolist()
        return vector

    @app.post("/maps")
    def maps(image: UploadFile) -> Response:
        found = {str(index): level for index, level in enumerate(levels(image.file.read())) if index}
        return Response(save(found), media_type="application/vnd.safetensors")

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
