"""Keys: how they are made, written and looked up. Nothing here keeps a key, only hashes of them.

A key is random, of 256 bits where `make_key` makes it, so that plain SHA-256 protects it: there is no dictionary that
a slow hash would have to slow down. That does not go for short keys of an operator's own, which are warned of.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import CannotStart

KEY_BYTES = 32
SAFE_KEY_CHARS = 16
MAX_KEY_CHARS = 512
MAX_FILE_BYTES = 2**20
MAX_PER_MINUTE = 10**9
HASH_SCHEME = "sha256:"
# What a client may have a quota of, by the words of a line.
QUOTAS = ("requests", "megapixels", "new_models")

log = logging.getLogger("service.keys")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME_RULE = "a name is 1 to 64 of A-Z a-z 0-9 . _ -"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_PLAIN = re.compile(r"[!-+\--~]*")  # what a header carries as it is: printable, no space, no comma
_QUOTA = re.compile(rf"({'|'.join(QUOTAS)})=([0-9]{{1,10}})")
_FORM = "NAME sha256:HASH [admin] " + " ".join(f"[{quota}=N]" for quota in QUOTAS)


@dataclass(frozen=True)
class Holder:
    """Whose a key is. Keys of one name are one client's: it has one quota, and is one in the logs.

    `quotas` are units a minute by `QUOTAS`, 0 for none; what is not in it is as the settings say.
    """

    name: str
    is_operator: bool = False
    quotas: Mapping[str, int] = field(default_factory=dict)


Holders = Mapping[bytes, Holder]


class BadKeys(CannotStart):
    """Keys that cannot be used; the text never repeats what is written there, for it may be a key."""


class Keyring:
    """Keys by their SHA-256; what a lookup takes says nothing about the keys there are.

    Hashes are hashed again with a secret of this process: of the values that are compared nobody outside knows any
    part, so that no time can lead to one, and a lookup takes the same for one key and for ten thousand.
    """

    def __init__(self, holders: Holders) -> None:
        self._secret = secrets.token_bytes(32)
        self._holders = {self._blinded(digest): holder for digest, holder in holders.items()}

    def holder(self, key: bytes) -> Holder | None:
        """Whose key this is; None if it is nobody's."""
        if len(key) > MAX_KEY_CHARS:
            return None
        return self._holders.get(self._blinded(hashlib.sha256(key).digest()))

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def make_key() -> str:
    """A new key, of 256 random bits."""
    return f"backbone_{secrets.token_urlsafe(KEY_BYTES)}"


def written_hash(key: str) -> str:
    """A key's hash as it is written in settings and files: `sha256:` and 64 hexadecimal digits."""
    return HASH_SCHEME + hashlib.sha256(key.encode()).hexdigest()


def file_line(holder: Holder, hash_text: str) -> str:
    """The line of a keys file for a key.

    Raises:
        BadKeys: the name or a quota is not valid.
    """
    if not _NAME.fullmatch(holder.name):
        raise BadKeys(_NAME_RULE)
    words = [holder.name, hash_text, *(["admin"] if holder.is_operator else [])]
    line = " ".join([*words, *(f"{quota}={number}" for quota, number in holder.quotas.items())])
    parse_line(line)
    return line


# --- the settings -------------------------------------------------------------------------------


def keys_of_setting(words: Iterable[str], *, is_operator: bool) -> Iterator[tuple[bytes, Holder]]:
    """The hashes of keys that a setting lists, each plain or as `sha256:HASH`; a client is called by its hash.

    Raises:
        BadKeys: one is too long to be a key, or cannot be sent in a header.
    """
    for word in words:
        digest = _digest_of_word(word)
        yield digest, Holder(digest.hex()[:8], is_operator)


def _digest_of_word(word: str) -> bytes:
    if word.startswith(HASH_SCHEME):
        if not _HASH.fullmatch(word):
            raise BadKeys("after sha256: come 64 digits of 0-9 and a-f")
        return bytes.fromhex(word.removeprefix(HASH_SCHEME))
    if len(word) > MAX_KEY_CHARS:
        raise BadKeys(f"a key has at most {MAX_KEY_CHARS} characters")
    if len(word) < SAFE_KEY_CHARS:
        advice = "`backbone-service key` makes a safe one"
        log.warning("a key of fewer than %d characters can be guessed; %s", SAFE_KEY_CHARS, advice)
    if not _PLAIN.fullmatch(word):
        raise BadKeys("a key has printable ASCII characters only, and no spaces")
    return hashlib.sha256(word.encode()).digest()


# --- the file -----------------------------------------------------------------------------------


def read_keys_file(path: Path) -> dict[bytes, Holder]:
    """The hashes of a keys file: `NAME sha256:HASH [admin] [requests=N] [megapixels=N] [new_models=N]` a line.

    Raises:
        BadKeys: it cannot be read, or a line of it cannot; says which.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                log.warning("everybody on this machine may read the keys file; chmod o-r it")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadKeys(f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadKeys(f"exceeds {MAX_FILE_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadKeys("is not text in UTF-8") from error
    return parse_keys(text)


def parse_keys(text: str) -> dict[bytes, Holder]:
    """The hashes of a keys file's text; `#` begins a comment.

    Raises:
        BadKeys: a line is wrong, a key is there twice, a name has two meanings, or there is no key at all.
    """
    holders: dict[bytes, Holder] = {}
    by_name: dict[str, Holder] = {}
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0]
        if not content.strip():
            continue
        try:
            digest, holder = parse_line(content)
        except BadKeys as error:
            raise BadKeys(f"line {number}: {error}") from error
        if digest in holders:
            raise BadKeys(f"line {number}: the key is there twice")
        if by_name.setdefault(holder.name, holder) != holder:
            raise BadKeys(f"line {number}: another line of this name says otherwise who it is or what it may")
        holders[digest] = holder
    if not holders:
        raise BadKeys("has no key in it")
    return holders


def parse_line(line: str) -> tuple[bytes, Holder]:
    """One line of a keys file: a hash and whose it is.

    Raises:
        BadKeys: it is not of the form.
    """
    words = line.split()
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise BadKeys(f"must be {_FORM}; {_NAME_RULE}")
    name, hash_text, *options = words
    if not _HASH.fullmatch(hash_text):
        raise BadKeys(f"must be {_FORM}; a hash is 64 digits of 0-9 and a-f")
    return bytes.fromhex(hash_text.removeprefix(HASH_SCHEME)), _holder(name, options)


def _holder(name: str, options: list[str]) -> Holder:
    quotas: dict[str, int] = {}
    for option in options:
        found = _QUOTA.fullmatch(option)
        if found is not None:
            quotas[found[1]] = int(found[2])
        elif option != "admin":
            raise BadKeys(f"must be {_FORM}")
    if len(quotas) + options.count("admin") != len(options) or options.count("admin") > 1:
        raise BadKeys("an option is there twice")
    if any(number > MAX_PER_MINUTE for number in quotas.values()):
        raise BadKeys(f"a quota is at most {MAX_PER_MINUTE:,} a minute")
    return Holder(name, "admin" in options, quotas)
