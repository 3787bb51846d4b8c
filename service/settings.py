"""Settings: environment variables `BACKBONE_*`, and flags of `backbone-service serve` of the same names."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MAX_DRAIN_S = 86_400
HUB = "https://huggingface.co"
LIBRARY_HOSTS = (
    "download.openmmlab.com",
    "download.pytorch.org",
    "dl.fbaipublicfiles.com",
    "huggingface.co",
    "github.com",
    "objects.githubusercontent.com",
    "release-assets.githubusercontent.com",
)
# No segment begins with a dot, so there is no way up; two slashes would name another host.
PATH_PREFIX = r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,63}){1,8}"
Names = Annotated[tuple[str, ...], NoDecode]


def _words(value: object) -> object:
    """`a, b` from the environment; flags and code may give a sequence."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


class Settings(BaseSettings):
    """Everything an operator can set; see `backbone-service serve --help`."""

    model_config = SettingsConfigDict(
        env_prefix="BACKBONE_", extra="ignore", frozen=True, populate_by_name=True
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    config_dir: Path = Field(Path("model_configs"), description="named configs")
    checkpoint_dir: Path = Field(
        Path("checkpoints"), description="where checkpoint names resolve and downloads are kept"
    )
    checkpoint_hosts: Names = Field(
        LIBRARY_HOSTS, description="hosts a checkpoint may be fetched from, comma separated"
    )
    checkpoint_mirrors: Names = Field(
        (), description="where a host's files are really fetched: host=base-url, comma separated"
    )
    hub_endpoint: str = Field(
        HUB,
        validation_alias=AliasChoices("BACKBONE_HUB_ENDPOINT", "HF_ENDPOINT"),
        description="the model hub; HF_ENDPOINT is understood too",
    )
    max_checkpoint_bytes: int = Field(
        8 * 2**30, ge=1, description="largest checkpoint that is downloaded or read"
    )
    download_timeout: float = Field(600.0, gt=0, description="seconds that one checkpoint download may take")
    image_hosts: Names = Field(
        (), description="hosts an image URL may name, comma separated; without any, URLs are refused"
    )
    image_networks: Names = Field(
        (),
        description="networks that are not public and images may come from all the same, comma separated; dangerous",
    )
    image_ca_file: Path | None = Field(
        None,
        description="PEM file of the authorities that vouch for image hosts, in place of the public ones",
    )
    image_timeout: float = Field(5.0, gt=0, description="seconds that fetching one image may take")
    api_keys: Names = Field(
        (), repr=False, description="keys of clients, plain or as sha256:HASH, comma separated"
    )
    admin_keys: Names = Field(
        (),
        repr=False,
        description="keys for POST and DELETE /models, likewise; their holders are clients too",
    )
    keys_file: Path | None = Field(
        None, description="file of hashed keys, one a line; read again on SIGHUP; see Keys"
    )
    allow_anonymous: bool = Field(False, description="a gateway in front of the service checks who asks")
    requests_per_minute: int = Field(
        0, ge=0, le=10**9, description="requests of each client in a minute; 0 is no quota"
    )
    megapixels_per_minute: int = Field(
        0, ge=0, le=10**9, description="megapixels of each client in a minute; 0 is no quota"
    )
    new_models_per_minute: int = Field(
        0,
        ge=0,
        le=10**9,
        description="configs and models of each client in a minute that are not known yet; 0 is no quota",
    )
    metrics_need_key: bool = Field(False, description="/metrics is for holders of a key only")
    root_path: str = Field(
        "/",
        pattern=rf"^(/|{PATH_PREFIX}/?)$",
        description="a path such as /vision that a gateway serves it below, unless the gateway says which",
    )
    forwarded_allow_ips: Names = Field(
        ("127.0.0.1", "::1"),
        description="proxies whose X-Forwarded-For, -Proto and -Prefix are believed: addresses and networks",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda|cuda:\d{1,2}|mps)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    engine: Literal["auto", "torch", "openvino", "inductor"] = Field(
        "auto",
        description="what runs the models: auto, torch, openvino or inductor; see Engines",
    )
    engine_cache: Path = Field(
        Path("engine_cache"), description="folder where converted networks are kept over a restart"
    )
    engine_cache_bytes: int = Field(
        10 * 2**30, ge=0, description="bytes that the folder of converted networks may take"
    )
    emulate_precision: bool = Field(
        False, description="compute in precisions that the device only emulates, slower than in float32"
    )
    model_budget: str = Field(
        "70%",
        pattern=r"^\d+(\.\d+)?%$|^\d+$",
        description="bytes that models may take, or percent of the free memory such as 70%",
    )
    work_memory: str = Field(
        "20%",
        pattern=r"^\d+(\.\d+)?%$|^\d+$",
        description="bytes that requests in flight may take, or percent of the free memory such as 20%",
    )
    min_residency: float = Field(
        1.0, ge=0, description="seconds a model stays in memory before it may be evicted"
    )
    warm: Names = Field((), description="named configs to load before /readyz says yes, comma separated")
    max_body_bytes: int = Field(20_000_000, ge=1, description="largest request body")
    body_budget: int = Field(
        1_000_000_000, ge=1, description="bytes that the bodies of all requests under way may take"
    )
    max_connections: int = Field(1000, ge=1, description="open connections, idle ones included")
    header_timeout: float = Field(10.0, gt=0, description="seconds for the headers of a request to come")
    body_timeout: float = Field(
        10.0, gt=0, description="seconds in which a body must end, or bring what the least rate asks for"
    )
    reply_timeout: float = Field(
        20.0, gt=0, description="seconds in which a client must take what the least rate asks for"
    )
    min_rate: int = Field(
        5000, ge=0, description="bytes a second, on average, of a body that comes or a reply that is read"
    )
    max_pixels: int = Field(40_000_000, ge=1, description="largest image, in pixels")
    max_images: int = Field(32, ge=1, le=1024, description="images in one request")
    max_reply_bytes: int = Field(64_000_000, ge=1, description="largest reply")
    queue_size: int = Field(512, ge=1, description="images that may wait for the device")
    max_batch: int = Field(
        16, ge=1, le=1024, description="images in one forward pass at most; how many pay is learned"
    )
    max_requests: int = Field(512, ge=1, description="requests that may be in flight")
    max_wait: float = Field(
        5.0,
        gt=0,
        description="seconds a request may be expected to wait for its turn; more is refused at once",
    )
    request_timeout: float = Field(30.0, gt=0, description="seconds a request may take")
    stuck_after: float = Field(
        120.0, gt=0, description="seconds that one batch or image may take before /healthz fails"
    )
    drain_delay: float = Field(
        0.0,
        ge=0,
        le=MAX_DRAIN_S,
        description="seconds after SIGTERM in which requests are still served, for gateways to notice",
    )
    drain_seconds: float = Field(
        10.0, ge=0, le=MAX_DRAIN_S, description="seconds to finish what is in flight at shutdown"
    )
    decode_threads: int = Field(
        0, ge=0, le=256, description="threads that decode and encode; 0 is one a core"
    )

    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="lines of the log: json, text, or auto: text on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged; probes are logged at debug"
    )
    tracing: bool = Field(
        False, description="send spans by OpenTelemetry's OTEL_* variables; needs the extra otel"
    )

    @field_validator(
        "checkpoint_hosts",
        "checkpoint_mirrors",
        "image_hosts",
        "image_networks",
        "api_keys",
        "admin_keys",
        "forwarded_allow_ips",
        "warm",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return _words(value)

    @field_validator("checkpoint_mirrors")
    @classmethod
    def _mirror_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mirror in value:
            host, _, url = mirror.partition("=")
            if not host or not url.startswith(("http://", "https://")):
                raise ValueError("a mirror is written host=http://base or host=https://base")
        return value

    @field_validator("keys_file", mode="before")
    @classmethod
    def _no_file(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _proxy_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            network = _network(proxy)
            if network is None:
                raise ValueError(f"{proxy!r} is neither an address nor a network such as 172.16.0.0/12")
            if network.prefixlen == 0:
                raise ValueError(f"{proxy} is everybody, who could then write any address into the headers")
        return value

    @model_validator(mode="after")
    def _guarded(self) -> Settings:
        if not (self.api_keys or self.keys_file or self.may_be_anonymous):
            raise ValueError(
                f"without BACKBONE_API_KEYS or BACKBONE_KEYS_FILE the service only starts on a loopback address, not "
                f"on {self.host}; set keys, or BACKBONE_ALLOW_ANONYMOUS=1 if a gateway in front of it checks who asks"
            )
        return self

    @property
    def may_be_anonymous(self) -> bool:
        """Whether clients need no key where there are none: a gateway checks, or only this machine can ask."""
        return self.allow_anonymous or is_loopback(self.host)

    @property
    def quotas(self) -> dict[str, int]:
        """Units that each client may take in a minute; 0 is no quota."""
        return {
            "requests": self.requests_per_minute,
            "megapixels": self.megapixels_per_minute,
            "new_models": self.new_models_per_minute,
        }

    @property
    def mirrors(self) -> dict[str, str]:
        """Base URLs by host."""
        return {host: url for host, _, url in (mirror.partition("=") for mirror in self.checkpoint_mirrors)}


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network("0.0.0.0/0" if text == "*" else text)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
