"""`GET /docs`: Swagger UI, served from this process so that it works without a network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from service.api.forwarded import address

router = APIRouter(include_in_schema=False)
ASSETS = "/docs/assets"


@router.get("/docs")
async def get_docs(request: Request) -> HTMLResponse:
    """The description, to read and to try."""
    return get_swagger_ui_html(
        openapi_url=address(request, "/openapi.json"),
        title="backbone-service",
        swagger_js_url=address(request, f"{ASSETS}/swagger-ui-bundle.js"),
        swagger_css_url=address(request, f"{ASSETS}/swagger-ui.css"),
        swagger_favicon_url=address(request, f"{ASSETS}/favicon.png"),
    )


def mount_assets(app: FastAPI) -> None:
    """Serve Swagger UI's own files."""
    static = Path(str(files("fastapi_offline"))) / "static"
    app.mount(ASSETS, StaticFiles(directory=static), name="docs-assets")
