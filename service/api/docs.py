"""`GET /docs`: Swagger UI, served from this process so that it works without a network."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike, stat_result
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

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


class WholeFiles(StaticFiles):
    """Files that are sent whole, whatever range is asked for: Starlette refuses a bad one in a form of its own."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """The reply with a file, or 304."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Accept-Ranges"] = "none"
        return response


def mount_assets(app: FastAPI) -> None:
    """Serve Swagger UI's own files."""
    static = Path(str(files("fastapi_offline"))) / "static"
    app.mount(ASSETS, WholeFiles(directory=static), name="docs-assets")
