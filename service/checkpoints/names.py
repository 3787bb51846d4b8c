"""What a checkpoint is called: a file of the checkpoint directory, of the hub, of a host, or of a library's table.

A name is taken apart by a closed table of schemes before anything else is done with it; each part has a
pattern, and no part of a name becomes a path that has not been checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from service.checkpoints.published import FOLDERS, SCHEMES, nearest_names, url_of

EXTENSIONS: Final = (".safetensors", ".pth", ".pt", ".bin", ".pyth", ".pkl")
HUB_SCHEME: Final = "hf-hub:"
DOWNLOAD_FOLDERS: Final = frozenset({"hub", "url"})
MAX_NAME_LENGTH: Final = 512
SHOWN_LENGTH: Final = 160
FORMS: Final = (
    "a file of the checkpoint directory",
    f"{HUB_SCHEME}ORGANISATION/NAME",
    "https://HOST/FILE",
    "open-mmlab://NAME",
    "mmcls://NAME",
    "torchvision://NAME",
    "detectron2://PATH",
    "catalog://NAME",
)
# What detectron2 reads of a path besides: names are matched here without being told.
HEURISTICS: Final = "?matching_heuristics=True"

_REPOSITORY_PART: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_FILE_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")
# Caffe2's detectors lie in folders with a colon in their name.
_FOLDER_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@:-]{0,199}")
_HOST: Final = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# torch.hub's own pattern is of any length; a date (`-20210831.pth`) is no digest.
_DIGEST: Final = re.compile(r"-(?!20[0-3][0-9][01][0-9][0-3][0-9]\.)([a-f0-9]{8,64})\.")


class RefusedNameError(ValueError):
    """A name that leads to no checkpoint; `detail` is written for the client."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnknownFileError(RefusedNameError):
    """A bare name that is not a file of the checkpoint directory, whatever the reason."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no checkpoint named {shown(name)}")


@dataclass(frozen=True)
class FileName:
    """A file below the checkpoint directory, by its checked parts."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, `revision` of it, and one file, or None for its usual one."""

    name: str
    organisation: str
    repository: str
    revision: str
    file: str | None


@dataclass(frozen=True)
class UrlName:
    """An https URL: its host, its path as written, its file name, and the digest's beginning in that name.

    `name` is the URL, also where a library's name (`open-mmlab://NAME`) led to it: they share one file.
    """

    name: str
    host: str
    path: str
    file: str
    digest: str

    @property
    def key(self) -> str:
        """What the downloaded file is called: a digest of the URL, so that two hosts' files stay apart."""
        return f"{hashlib.sha256(self.name.encode()).hexdigest()[:16]}-{self.file}"


Name = FileName | HubName | UrlName


def parse_name(name: str) -> Name:
    """The name in its parts.

    Raises:
        RefusedNameError: an unknown scheme, a malformed part, an extension that is not read.
    """
    if not name or len(name) > MAX_NAME_LENGTH or _CONTROL.search(name):
        raise UnknownFileError(name)
    scheme = _SCHEME.match(name)
    if scheme is None:
        return _file_name(name)
    parse = _PARSERS.get(scheme.group())
    if parse is None:
        raise RefusedNameError(f"{shown(name)} is none of: {', '.join(FORMS)}")
    return parse(name)


def shown(name: str) -> str:
    """A client's name for an error's text: quoted, escaped and not too long."""
    return repr(name if len(name) <= SHOWN_LENGTH else f"{name[:SHOWN_LENGTH]}…")


def check_extension(file: str) -> None:
    """Refuse files that are not read as checkpoints.

    Raises:
        RefusedNameError: with the extensions that are.
    """
    if not file.lower().endswith(EXTENSIONS):
        extension = PurePosixPath(file).suffix[:16]
        detail = f"{extension!r} files are not served; a checkpoint is one of {', '.join(EXTENSIONS)}"
        raise RefusedNameError(detail)


def _file_name(name: str) -> FileName:
    parts = tuple(name.split("/"))
    hidden = any(part.startswith((".", "~")) or not part for part in parts)
    if hidden or "\\" in name or parts[0] in DOWNLOAD_FOLDERS:
        raise UnknownFileError(name)
    check_extension(parts[-1])
    return FileName(name, parts)


def _hub_name(name: str) -> HubName:
    organisation, _, rest = name.removeprefix(HUB_SCHEME).partition("/")
    tagged, slash, file = rest.partition("/")
    repository, at, revision = tagged.partition("@")
    parts = (organisation, repository, *([revision] if at else []))
    well_formed = all(_is_repository_part(part) for part in parts)
    if not well_formed or (slash and not all(_FILE_PART.fullmatch(part) for part in file.split("/"))):
        detail = f"{shown(name)} is not of the form {HUB_SCHEME}ORGANISATION/NAME[@REVISION][/FILE]"
        raise RefusedNameError(detail)
    if slash:
        check_extension(file)
    return HubName(name, organisation, repository, revision or "main", file or None)


def _is_repository_part(part: str) -> bool:
    return bool(_REPOSITORY_PART.fullmatch(part)) and "--" not in part and ".." not in part


def _url_name(name: str) -> UrlName:
    try:
        url = urlsplit(name)
    except ValueError as error:  # a malformed address in brackets
        raise RefusedNameError(f"{shown(name)} is not a URL") from error
    host = url.netloc.lower()
    plain = name.startswith("https://") and not url.query and not url.fragment and url.path.startswith("/")
    if not plain or not _HOST.fullmatch(host):
        raise RefusedNameError(f"{shown(name)}: a checkpoint URL is https, a host, and a path, nothing else")
    parts = [unquote(part) for part in url.path.split("/")[1:]]
    well_formed = all(_FOLDER_PART.fullmatch(part) for part in parts[:-1])
    if not well_formed or not _FILE_PART.fullmatch(parts[-1]):
        raise RefusedNameError(f"{shown(name)}: the path of a checkpoint URL is of plain names")
    check_extension(parts[-1])
    return UrlName(name, host, url.path, parts[-1], digest_in(parts[-1]))


def _folder_name(name: str) -> UrlName:
    """The URL that a path of a library's host is."""
    scheme, slashes, path = name.partition("//")
    if not slashes or not path:
        raise RefusedNameError(f"{shown(name)} is not of the form {scheme.partition(':')[0]}://PATH")
    return _url_name(FOLDERS[scheme] + path.removesuffix(HEURISTICS))


def _published_name(name: str) -> UrlName:
    """The URL that a library's table has for a name.

    Raises:
        RefusedNameError: the table has no such name; the nearest ones are told.
    """
    scheme, _, rest = name.partition("//")
    if scheme not in SCHEMES or not rest:
        scheme = name.partition(":")[0]
        raise RefusedNameError(f"{shown(name)} is not of the form {scheme}://NAME")
    url = url_of(scheme, rest)
    if url is None:
        nearest = ", ".join(nearest_names(scheme, rest))
        detail = UnknownFileError(name).detail
        raise RefusedNameError(f"{detail}; nearest: {nearest}" if nearest else detail)
    return _url_name(url)


def digest_in(file: str) -> str:
    """The beginning of the file's sha256 that its name carries (`resnet50-0676ba61.pth`), or empty."""
    found = _DIGEST.search(file)
    return found.group(1) if found else ""


_PARSERS: Final[Mapping[str, Callable[[str], Name]]] = {
    HUB_SCHEME: _hub_name,
    "https:": _url_name,
    **dict.fromkeys(SCHEMES, _published_name),
    **dict.fromkeys(FOLDERS, _folder_name),
}
