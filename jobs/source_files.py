"""The raw files behind a log: which they are, their checksums, their headers. Starts no engine.

A checksum costs one read of the file, so a file whose path, size and modification time are as the newest manifest
remembers them is not read again; a file that changes content and keeps all three would go unnoticed. Files lie on a
path that the driver can open (a disk or a mount).
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from schemas.config import SourceConfig
from schemas.errors import ConfigError, ContractViolation

SUFFIXES = (".csv", ".csv.gz")
# What each pattern's files hold, by kind of source.
PATTERNS = {"log": "log_*", "users": "user_features*", "items": "video_features_basic*"}


@dataclass(frozen=True)
class SourceFile:
    """One raw file. `role` is log, users or items; `name` is unique within the source."""

    role: str
    name: str
    path: str
    size: int
    mtime_ns: int
    sha256: str

    @property
    def stamp(self) -> tuple[str, str]:
        """What an identity says of the file: its name, which orders rows and marks rejected ones, and its content."""
        return self.name, self.sha256


def find_files(source: SourceConfig, known: Iterable[Mapping[str, Any]] = ()) -> list[SourceFile]:
    """The files of the source in (role, name) order; `known` are entries of an earlier manifest.

    Raises ConfigError where source.path is empty or missing, or holds no file of a role that the source needs.
    """
    if not source.path:
        raise ConfigError("source.path is empty; set it to the folder of the raw logs, or to the file of sequences.")
    root = Path(source.path)
    if not root.exists():
        raise ConfigError(f"source.path is {source.path}, which does not exist; correct it in the configuration.")
    remembered = {(e["path"], e["size"], e["mtime_ns"]): e["sha256"] for e in known}
    found = _sequence_files(root) if source.kind == "sequences" else _kuairand_files(root)
    return [_describe(role, path, remembered) for role, path in found]


def headers(files: Iterable[SourceFile]) -> dict[str, str]:
    """The first line of each file by name, gzip or plain. Raises ContractViolation for an empty or broken file."""
    return {file.name: _first_line(Path(file.path)) for file in files}


def manifest_entry(file: SourceFile) -> dict[str, Any]:
    return asdict(file)


def _kuairand_files(root: Path) -> list[tuple[str, Path]]:
    if not root.is_dir():
        raise ConfigError(f"source.path is {root}, which is no folder; source.kind kuairand needs the folder of its files.")
    found = []
    for role, pattern in PATTERNS.items():
        paths = sorted(p for p in root.glob(pattern) if p.is_file() and p.name.endswith(SUFFIXES))
        if not paths:
            raise ConfigError(f"{root} holds no file {pattern}.csv or {pattern}.csv.gz; add it or correct source.path.")
        found += [(role, path) for path in paths]
    return found


def _sequence_files(root: Path) -> list[tuple[str, Path]]:
    paths = [root] if root.is_file() else sorted(root.glob("*.txt"))
    if len(paths) != 1:
        raise ConfigError(
            f"{root} holds {len(paths)} .txt files, and source.kind sequences needs one; name it in source.path."
        )
    return [("log", paths[0])]


def _describe(role: str, path: Path, remembered: Mapping[tuple[str, int, int], str]) -> SourceFile:
    stat = path.stat()
    location = str(path.resolve())
    sha256 = remembered.get((location, stat.st_size, stat.st_mtime_ns)) or _sha256(path)
    return SourceFile(role, path.name, location, stat.st_size, stat.st_mtime_ns, sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(path: Path) -> str:
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            line = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ContractViolation(f"{path.name}: not a complete gzip file ({error}); copy it again.") from error
    if not line.strip():
        raise ContractViolation(f"{path.name}: the file is empty or lacks its header line; copy it again.")
    return line
