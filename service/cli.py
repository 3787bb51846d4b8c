"""`backbone-service`: the command. Each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import http.client
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from service.logs import set_up_logs
from service.settings import Settings
from service.version import service_version

log = logging.getLogger("service.cli")
SHOWN_NAMES = 8
QUOTA_UNITS = {
    "requests": "requests",
    "megapixels": "megapixels",
    "new_models": "configs and models that are not known yet",
}
HEALTH_TIMEOUT_S = 3.0
HEALTH_REPLY_BYTES = 4096
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # compared, not bound to


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    options = make_parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The command line: every subcommand with its flags."""
    parser = argparse.ArgumentParser(
        "backbone-service", description="Images to the features of vision backbones."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {service_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_health(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_key(commands)
    return parser


def _fail(message: str, status: int) -> int:
    print(f"backbone-service: {message}", file=sys.stderr)
    return status


# --- serve --------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run the service",
        description="Run the service. Every flag is also an environment variable: --model-budget is "
        "BACKBONE_MODEL_BUDGET. Flags go before the environment. SIGTERM finishes what is in flight.",
    )
    for name, field in Settings.model_fields.items():
        text = f"{field.description} (default: {shown_default(name)})".replace("%", "%%")
        if field.annotation is bool:
            serve.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            serve.add_argument(flag_of(name), default=None, metavar=name.upper(), help=text)
    serve.set_defaults(run=_serve)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"BACKBONE_{name.upper()}"


def shown_default(name: str) -> str:
    """The default of a setting, as one would write it."""
    default = Settings.model_fields[name].default
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default).removeprefix("False") or "no"


def settings_from(options: argparse.Namespace) -> Settings:
    """Settings of the environment, with the flags that were given on top."""
    flags = {name: getattr(options, name) for name in Settings.model_fields}
    return Settings(**{name: value for name, value in flags.items() if value is not None})


def _serve(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
    except ValidationError as error:
        return _fail("; ".join(_fault_text(fault) for fault in error.errors()), 2)
    if fault := _folder_fault(settings):
        return _fail(fault, 2)
    from service.api.server import run_server  # the web stack is only needed here

    set_up_logs(settings.log_format, settings.log_level)
    _warn(settings)
    status = run_server(settings)
    # Everyone has been answered. A thread that still downloads or loads would hold a plain exit back.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _named(name: str) -> str:
    return f"{flag_of(name)} ({variable_of(name)})"


def _fault_text(fault: Mapping[str, Any]) -> str:
    """What is wrong with one setting, by the names an operator knows it under."""
    text = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return text
    name = str(fault["loc"][0]).lower().removeprefix("backbone_").replace("hf_endpoint", "hub_endpoint")
    if fault["type"] == "string_pattern_mismatch":  # a regular expression tells nobody anything
        text = f"must be {Settings.model_fields[name].description}, not {fault['input']!r}"
    return f"{_named(name)}: {text}"


def _folder_fault(settings: Settings) -> str | None:
    """A folder that was asked for must be there; the checkpoint folder is made by the first download."""
    if "config_dir" in settings.model_fields_set and not settings.config_dir.is_dir():
        return f"{_named('config_dir')}: no directory {str(settings.config_dir)!r}"
    if settings.checkpoint_dir.exists() and not settings.checkpoint_dir.is_dir():
        return f"{_named('checkpoint_dir')}: {str(settings.checkpoint_dir)!r} is not a directory"
    return None


def _warn(settings: Settings) -> None:
    """Say what is probably not meant."""
    if not settings.config_dir.is_dir():
        log.warning("no directory %r: there are no named configs", str(settings.config_dir))
    if "checkpoint_dir" in settings.model_fields_set and not settings.checkpoint_dir.exists():
        log.warning("no directory %r yet: the first download makes it", str(settings.checkpoint_dir))
    known = {variable_of(name) for name in Settings.model_fields} | {"BACKBONE_BUILD"}
    for variable in sorted(name for name in os.environ if name.startswith("BACKBONE_")):
        if variable.upper() not in known:
            log.warning("%s is no setting and does nothing", variable)


# --- health -------------------------------------------------------------------------------------


def _add_health(commands: Any) -> None:
    health = commands.add_parser(
        "health",
        help="ask a running service whether it is alive",
        description="Exit with 0 if the service of this machine answers that it is alive, else with 1 and the reason: "
        "for a container's health check, where there is no curl.",
    )
    health.add_argument("--ready", action="store_true", help="ask whether it may be sent requests instead")
    health.add_argument(
        "--port",
        type=int,
        default=os.environ.get("BACKBONE_PORT", str(Settings.model_fields["port"].default)),
        help="port that it listens on (default: BACKBONE_PORT, else 8000)",
    )
    health.set_defaults(run=_health)


def _health(options: argparse.Namespace) -> int:
    path = "/readyz" if options.ready else "/healthz"
    connection = http.client.HTTPConnection(_probed_host(), options.port, timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        answer = reply.read(HEALTH_REPLY_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return _fail(f"{path}: no answer ({error})", 1)
    finally:
        connection.close()
    print(answer)
    return 0 if reply.status == http.HTTPStatus.OK else 1


def _probed_host() -> str:
    """Where a service of this machine is asked: an address that stands for all of them cannot be connected to."""
    host = os.environ.get("BACKBONE_HOST", str(Settings.model_fields["host"].default))
    return EVERY_ADDRESS.get(host, host)


# --- inspect ------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a config would build",
        description="Levels, parameters, bytes and frozen names of a backbone config, without weights, as JSON.",
    )
    inspect.add_argument(
        "backbone", help='a config as JSON ({"type":"ResNet","depth":50}) or the name of one'
    )
    inspect.add_argument("--neck", help="a neck config as JSON (default: none)")
    inspect.add_argument(
        "--input-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels (default: the backbone's own)",
    )
    inspect.add_argument(
        "--config-dir",
        default=os.environ.get("BACKBONE_CONFIG_DIR", "model_configs"),
        help="named configs (default: BACKBONE_CONFIG_DIR, else model_configs)",
    )
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from service.errors import ServiceError
    from service.runtime.inspect import inspect_offline

    size = tuple(options.input_size) if options.input_size else None
    if size and min(size) < 1:
        return _fail("--input-size: must be positive", 2)
    try:
        backbone, neck = _json_or_word(options.backbone), _json_or_word(options.neck)
    except orjson.JSONDecodeError as error:
        return _fail(f"not JSON: {error}", 1)
    try:
        found = inspect_offline(options.config_dir, backbone, neck, size)
    except ServiceError as error:
        return _fail(error.detail, 1)
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    return 0


def _json_or_word(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith(("{", "[", '"')):
        return text
    return orjson.loads(text)


# --- convert ------------------------------------------------------------------------------------


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="rename the weights of a checkpoint file",
        description="Write a checkpoint by the names that another library has for the same network: mmpretrain, "
        "mmdet, mmselfsup, timm, torchvision, detectron2, official (the code of the network's paper). Tensors are "
        "reordered where the libraries keep them in different orders. Nothing that a file names is run.",
    )
    convert.add_argument("input", help="a .pth, .pt, .safetensors, .pkl, … file")
    convert.add_argument("output", help="a .safetensors file, or .pth")
    convert.add_argument("--to", required=True, metavar="LIBRARY", help="whose names to write")
    convert.add_argument(
        "--from", dest="source", metavar="LIBRARY", help="whose names the input has (default: found out)"
    )
    convert.add_argument(
        "--prefix", default="", help="put before every name written: backbone. (default: nothing)"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from service.backbones.conversion import convert_file, libraries
    from service.errors import ServiceError

    for flag, library in (("--to", options.to), ("--from", options.source)):
        if library is not None and library not in libraries():
            return _fail(f"{flag}: {library!r} is none of {', '.join(libraries())}", 2)
    try:
        done = convert_file(
            Path(options.input),
            Path(options.output),
            options.to,
            source=options.source,
            prefix=options.prefix,
            overwrite=options.overwrite,
        )
    except ServiceError as error:
        return _fail(error.detail.removeprefix("#/input: ").removeprefix("#/output: "), 1)
    except OSError as error:
        return _fail(f"{options.output}: {error.strerror}", 1)
    below = f" below {done.prefix!r}" if done.prefix else ""
    written = (
        f"{done.kind}: {len(done.renamed.state)} tensors from {done.source}'s names{below} to {done.target}'s"
    )
    print(written + _left_out(done.renamed.left))
    return 0


def _left_out(names: Sequence[str]) -> str:
    """What has no counterpart, for the last part of a line."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"; left out: {', '.join(names[:SHOWN_NAMES])}{more}"


# --- key ----------------------------------------------------------------------------------------


def _add_key(commands: Any) -> None:
    key = commands.add_parser(
        "key",
        help="make a key and its line for BACKBONE_KEYS_FILE",
        description="Make a random key. The line for the keys file goes to the standard output, with a hash in place "
        "of the key; the key itself goes to the terminal (standard error), once: it is kept nowhere. "
        "backbone-service key --name alice >> keys",
    )
    key.add_argument(
        "--name", required=True, help="whose it is, for logs and quotas: letters, digits and . _ -"
    )
    key.add_argument("--admin", action="store_true", help="its holder may POST and DELETE /models too")
    for quota, unit in QUOTA_UNITS.items():
        text = f"{unit} in a minute, 0 for no quota (default: as the service's settings say)"
        key.add_argument(f"--{quota.replace('_', '-')}", type=int, metavar="N", help=text)
    key.set_defaults(run=_key)


def _key(options: argparse.Namespace) -> int:
    from service.api.keys import BadKeys, Holder, file_line, make_key, written_hash

    quotas = {quota: getattr(options, quota) for quota in QUOTA_UNITS if getattr(options, quota) is not None}
    key = make_key()
    try:
        line = file_line(Holder(options.name, options.admin, quotas), written_hash(key))
    except BadKeys as error:
        return _fail(str(error), 2)
    print(line, flush=True)
    print(f"the key, which is shown this once: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
