"""A client of the service, in two kinds that differ in nothing but `await`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from service.protocol.decode import Features, decode
from service.protocol.negotiate import SAFETENSORS
from service.protocol.reply import FloatArray

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0

Config = Mapping[str, Any] | str
Necks = Config | Sequence[Config]  # one, or one behind the other
Image = Path | str | bytes  # a text is a path, or a URL for the service to fetch
FilePart = tuple[str, tuple[str, bytes] | tuple[str, bytes, str]]


class BackboneServiceError(Exception):
    """The service refused or failed; `problem` is its `application/problem+json`.

    `faults` are (pointer, detail) pairs of what is wrong with the request; `retry_after_s` says when to
    ask again.
    """

    def __init__(
        self, status: int, problem: Mapping[str, Any], *, retry_after_s: float | None = None
    ) -> None:
        self.status = status
        self.problem = dict(problem)
        self.request_id: str | None = problem.get("request_id")
        self.retry_after_s = retry_after_s
        self.faults = tuple(
            (fault.get("pointer", ""), fault.get("detail", "")) for fault in problem.get("errors", ())
        )
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")


@dataclass(frozen=True)
class Call:
    """One request to the service, built without touching the network."""

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[FilePart] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The HTTP request, against the base URL of `http`."""
        return http.build_request(
            self.method,
            self.path,
            params=dict(self.params) or None,
            json=self.body,
            data=dict(self.parts) or None,
            files=list(self.files) or None,
            headers=dict(self.headers),
        )


# --- what to ask --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureOptions:
    """The keys of `POST /features` beside the images; what is None is the service's default."""

    backbone: Config
    neck: Necks | None = None
    preprocess: Config | None = None
    precision: str | None = None
    returns: str | None = None
    dtype: str | None = None
    pool: str | None = None
    normalize: bool | None = None
    encoding: str | None = None

    def parts(self) -> dict[str, str]:
        """Text parts as multipart sends them: words as they are, anything else as JSON."""
        return {name: _text(value) for name, value in self.given().items()}

    def given(self) -> dict[str, Any]:
        """The keys as the service calls them, without what is its default."""
        named = {("return" if name == "returns" else name): value for name, value in vars(self).items()}
        return {name: value for name, value in named.items() if value is not None}


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)


def features_call(
    options: FeatureOptions, images: Image | Sequence[Image], tensor: FloatArray | None, accept: str
) -> Call:
    """`POST /features` as multipart, or as JSON where an image is a URL; reads the image files.

    Raises:
        ValueError: neither images nor a tensor, or both.
        OSError: an image file cannot be read.
    """
    if isinstance(images, Path | str | bytes):
        images = [images]
    if bool(images) == (tensor is not None):
        raise ValueError("give images or a tensor: one of the two")
    headers = {"Accept": accept}
    if any(_is_url(image) for image in images):
        body = {**options.given(), "images": [_image_ref(image) for image in images]}
        return Call("POST", "/features", body=body, headers=headers)
    files = [_tensor_part(tensor)] if tensor is not None else [_image_part(image) for image in images]
    return Call("POST", "/features", parts=options.parts(), files=files, headers=headers)


def _is_url(image: Image) -> bool:
    return isinstance(image, str) and image.lower().startswith(("https://", "http://"))


def _image_ref(image: Image) -> dict[str, str]:
    """An image as JSON has it."""
    if _is_url(image):
        return {"url": str(image)}
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return {"base64": base64.b64encode(data).decode()}


def _image_part(image: Image) -> FilePart:
    if isinstance(image, bytes):
        return "image", ("image", image, "application/octet-stream")
    path = Path(image)
    return "image", (path.name, path.read_bytes())


def _tensor_part(tensor: FloatArray) -> FilePart:
    """A `.npy` of float32, [n, c, h, w], already normalised."""
    buffer = BytesIO()
    np.save(buffer, np.ascontiguousarray(tensor, dtype="<f4"), allow_pickle=False)
    return "tensor", ("tensor.npy", buffer.getvalue(), "application/x-npy")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _backbones(search: str | None, scope: str | None, limit: int | None, cursor: str | None) -> Call:
    params = _given(search=search, scope=scope, limit=limit, cursor=cursor)
    return Call("GET", "/backbones", params=params)


def _inspect(backbone: Config, neck: Necks | None, input_size: tuple[int, int] | None) -> Call:
    size = list(input_size) if input_size is not None else None
    return Call("POST", "/backbones/inspect", body=_given(backbone=backbone, neck=neck, input_size=size))


def _load(backbone: Config, neck: Necks | None, preprocess: Config | None) -> Call:
    return Call("POST", "/models", body=_given(backbone=backbone, neck=neck, preprocess=preprocess))


def _named(method: str, path: str, name: str) -> Call:
    return Call(method, f"{path}/{quote(name, safe='')}")


# --- what comes back ----------------------------------------------------------------------------


def _features(response: httpx.Response) -> Features:
    headers = response.headers
    features = decode(headers.get("Content-Type", ""), response.content)
    return replace(
        features,
        request_id=headers.get("X-Request-ID"),
        model_id=headers.get("X-Model-ID"),
        etag=headers.get("ETag"),
    )


def _document(response: httpx.Response) -> dict[str, Any]:
    document: dict[str, Any] = response.json()
    return document


def checked(response: httpx.Response) -> httpx.Response:
    """The response itself, where it is a success.

    Raises:
        BackboneServiceError: anything else, a redirect too: the service sends none.
    """
    if response.is_success:
        return response
    retry_after = response.headers.get("Retry-After", "")
    raise BackboneServiceError(
        response.status_code,
        _problem(response),
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The problem of a response; one made up from the status where something in between answered."""
    if response.headers.get("Content-Type", "").startswith("application/problem+json"):
        return _document(response)
    return {"title": response.reason_phrase, "status": response.status_code, "detail": "no description"}


def _headers(api_key: str | None, compressed: bool) -> dict[str, str]:
    # Said either way: HTTPX would ask for gzip unasked, and 6 MB of maps take longer to compress than to send.
    asked = {"Accept-Encoding": "zstd, gzip" if compressed else "identity"}
    return asked if api_key is None else {**asked, "Authorization": f"Bearer {api_key}"}


# --- the two clients ----------------------------------------------------------------------------


class BackboneClient:
    """A connection pool to one service; use it as a context manager or `close` it.

    Every method raises `BackboneServiceError` where the service refuses, and `httpx.TransportError` where it
    cannot be reached. No call is repeated.

    Args:
        base_url: where the service is; below a path, if a gateway serves it there.
        api_key: sent as `Authorization: Bearer`.
        timeout_s: of each call; the first one of a model includes its loading.
        compressed: ask for compressed replies; pays where the network is slower than about 1 Gbit/s.
        transport: another way out than the network, for tests.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        compressed: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url, headers=_headers(api_key, compressed), timeout=timeout_s, transport=transport
        )

    def __enter__(self) -> BackboneClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, call: Call) -> httpx.Response:
        return checked(self._http.send(call.request(self._http)))

    def features(
        self,
        images: Image | Sequence[Image] = (),
        *,
        backbone: Config,
        tensor: FloatArray | None = None,
        neck: Necks | None = None,
        preprocess: Config | None = None,
        precision: str | None = None,
        returns: str | None = None,
        dtype: str | None = None,
        pool: str | None = None,
        normalize: bool | None = None,
        encoding: str | None = None,
        accept: str = SAFETENSORS,
    ) -> Features:
        """The features of images, or of one tensor [n, c, h, w] that is already normalised.

        Args:
            images: a path, the bytes of an image file, or a URL that the service may fetch; or several.
            backbone: a config or the name of one.
            accept: the reply's format; JSON holds shapes and statistics unless `returns="tensors"`.
        """
        options = FeatureOptions(
            backbone, neck, preprocess, precision, returns, dtype, pool, normalize, encoding
        )
        return _features(self._send(features_call(options, images, tensor, accept)))

    def backbones(
        self,
        search: str | None = None,
        *,
        scope: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """One page of the backbone types; `next` is the cursor of the page after."""
        return _document(self._send(_backbones(search, scope, limit, cursor)))

    def backbone(self, type: str) -> dict[str, Any]:
        """One type: its parameters' schema, architectures, indices and an example."""
        return _document(self._send(_named("GET", "/backbones", type)))

    def inspect(
        self,
        backbone: Config,
        *,
        neck: Necks | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The levels and the size of a model that is not built; `input_size` is [height, width] in pixels."""
        return _document(self._send(_inspect(backbone, neck, input_size)))

    def configs(self) -> dict[str, Any]:
        """The named configs."""
        return _document(self._send(Call("GET", "/configs")))

    def config(self, name: str) -> dict[str, Any]:
        """One named config, as written and as resolved."""
        return _document(self._send(_named("GET", "/configs", name)))

    def models(self) -> dict[str, Any]:
        """The models in memory and the budget."""
        return _document(self._send(Call("GET", "/models")))

    def load(
        self, backbone: Config, *, neck: Necks | None = None, preprocess: Config | None = None
    ) -> dict[str, Any]:
        """Load a model ahead of its first image; needs an admin key where keys are set."""
        return _document(self._send(_load(backbone, neck, preprocess)))

    def unload(self, model_id: str) -> dict[str, Any]:
        """Unload a model once nobody uses it; `state` says `unloaded` or `unloading`. Needs an admin key."""
        return _document(self._send(_named("DELETE", "/models", model_id)))

    def health(self) -> dict[str, Any]:
        """Liveness; raises where the service is not well."""
        return _document(self._send(Call("GET", "/healthz")))

    def ready(self) -> dict[str, Any]:
        """Readiness; raises where the service is not ready."""
        return _document(self._send(Call("GET", "/readyz")))

    def version(self) -> dict[str, Any]:
        """Versions of the service and of its libraries."""
        return _document(self._send(Call("GET", "/version")))


class AsyncBackboneClient:
    """`BackboneClient` for asyncio: the same methods, awaited; files are read in a thread."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        compressed: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=_headers(api_key, compressed), timeout=timeout_s, transport=transport
        )

    async def __aenter__(self) -> AsyncBackboneClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, call: Call) -> httpx.Response:
        return checked(await self._http.send(call.request(self._http)))

    async def features(
        self,
        images: Image | Sequence[Image] = (),
        *,
        backbone: Config,
        tensor: FloatArray | None = None,
        neck: Necks | None = None,
        preprocess: Config | None = None,
        precision: str | None = None,
        returns: str | None = None,
        dtype: str | None = None,
        pool: str | None = None,
        normalize: bool | None = None,
        encoding: str | None = None,
        accept: str = SAFETENSORS,
    ) -> Features:
        """As `BackboneClient.features`."""
        options = FeatureOptions(
            backbone, neck, preprocess, precision, returns, dtype, pool, normalize, encoding
        )
        call = await asyncio.to_thread(features_call, options, images, tensor, accept)
        return _features(await self._send(call))

    async def backbones(
        self,
        search: str | None = None,
        *,
        scope: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """As `BackboneClient.backbones`."""
        return _document(await self._send(_backbones(search, scope, limit, cursor)))

    async def backbone(self, type: str) -> dict[str, Any]:
        """As `BackboneClient.backbone`."""
        return _document(await self._send(_named("GET", "/backbones", type)))

    async def inspect(
        self,
        backbone: Config,
        *,
        neck: Necks | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """As `BackboneClient.inspect`."""
        return _document(await self._send(_inspect(backbone, neck, input_size)))

    async def configs(self) -> dict[str, Any]:
        """As `BackboneClient.configs`."""
        return _document(await self._send(Call("GET", "/configs")))

    async def config(self, name: str) -> dict[str, Any]:
        """As `BackboneClient.config`."""
        return _document(await self._send(_named("GET", "/configs", name)))

    async def models(self) -> dict[str, Any]:
        """As `BackboneClient.models`."""
        return _document(await self._send(Call("GET", "/models")))

    async def load(
        self, backbone: Config, *, neck: Necks | None = None, preprocess: Config | None = None
    ) -> dict[str, Any]:
        """As `BackboneClient.load`."""
        return _document(await self._send(_load(backbone, neck, preprocess)))

    async def unload(self, model_id: str) -> dict[str, Any]:
        """As `BackboneClient.unload`."""
        return _document(await self._send(_named("DELETE", "/models", model_id)))

    async def health(self) -> dict[str, Any]:
        """As `BackboneClient.health`."""
        return _document(await self._send(Call("GET", "/healthz")))

    async def ready(self) -> dict[str, Any]:
        """As `BackboneClient.ready`."""
        return _document(await self._send(Call("GET", "/readyz")))

    async def version(self) -> dict[str, Any]:
        """As `BackboneClient.version`."""
        return _document(await self._send(Call("GET", "/version")))
