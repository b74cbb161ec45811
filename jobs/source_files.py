"""The raw files behind a log: which they are, their checksums, their headers and columns. Starts no engine.

A checksum costs one read of the file, so a file whose path, size and modification time are as the newest manifest
remembers them is not read again; a file that changes content and keeps all three would go unnoticed. Files lie on a
path that the driver can open (a disk or a mount).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.mapping import mapping_of, role_mappings
from schemas.errors import ConfigError, ContractViolation
from schemas.source import SourceConfig

CSV = (".csv", ".csv.gz")
TEXT = (*CSV, ".tsv", ".tsv.gz", ".txt", ".txt.gz")  # with a header line
PARQUET = (".parquet",)
TAGS = "tags"  # role and file of what users wrote, which MovieLens may lack


@dataclass(frozen=True)
class SourceFile:
    """One raw file. `role` is log, items, users or tags; `name` is the path below the source's folder."""

    role: str
    name: str
    path: str
    size: int
    mtime_ns: int
    sha256: str
    titled: bool = True  # begins with a header line

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(PARQUET)

    @property
    def stamp(self) -> tuple[str, str]:
        """What an identity says of the file: its name, which orders rows and marks rejected ones, and its content."""
        return self.name, self.sha256


def find_files(source: SourceConfig, known: Iterable[Mapping[str, Any]] = (), checksums: bool = True) -> list[SourceFile]:
    """The files of the source in (role, name) order; `known` are entries of an earlier manifest. Without `checksums`
    no file is read, and `sha256` is empty.

    Raises ConfigError where source.path is empty or missing, or holds no file of a role that the source needs.
    """
    if not source.path:
        raise ConfigError("source.path is empty; set it to the folder of the raw logs, or to the file of sequences.")
    root = Path(source.path)
    if not root.exists():
        raise ConfigError(f"source.path is {source.path}, which does not exist; correct it in the configuration.")
    remembered = {(e["path"], e["size"], e["mtime_ns"]): e["sha256"] for e in known} if checksums else None
    # Below the resolved root links stay links, so that names, and what Spark says of a row's file, agree.
    root = root.resolve()
    if source.kind == "sequences":
        path = _sequence_file(root)
        return [_describe("log", path, path.parent, remembered, titled=False)]
    if not root.is_dir():
        raise ConfigError(f"source.path is {root}, which is no folder; source.kind {source.kind} needs one.")
    found = []
    for role, patterns in _patterns(source).items():
        paths = _matching(root, patterns)
        if not paths and role != TAGS:
            raise ConfigError(
                f"{root} holds no file {' or '.join(patterns)}; add it or correct source.path{_or_key(source, role)}."
            )
        found += [_describe(role, path, root, remembered, not path.name.endswith(PARQUET)) for path in paths]
    return found


def _patterns(source: SourceConfig) -> dict[str, list[str]]:
    """By role, the patterns of the files that a source of this kind holds."""
    named = {role: mapping.files for role, mapping in role_mappings(mapping_of(source)).items()}
    if source.kind == "movielens":
        named[TAGS] = TAGS
    suffixes = ("",) if source.kind == "mapped" else CSV
    return {role: [name + suffix for suffix in suffixes] for role, name in named.items()}


def _or_key(source: SourceConfig, role: str) -> str:
    return f" or source.{role}.files (names end in {', '.join(TEXT + PARQUET)})" if source.kind == "mapped" else ""


def _matching(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Files below `root` that match, and those directly in folders that match, as Spark writes them."""
    found: set[Path] = set()
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        found |= set(path.iterdir()) if path.is_dir() else {path}
    return sorted(p for p in found if p.is_file() and p.name.endswith(TEXT + PARQUET) and not p.name.startswith(("_", ".")))


def headers(files: Iterable[SourceFile]) -> dict[str, str]:
    """The first line of each file by name, gzip or plain. Raises ContractViolation for an empty or broken file."""
    return {file.name: _first_line(Path(file.path)) for file in files}


def column_names(header: str, separator: str = ",") -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=separator))]


def column_types(file: SourceFile, separator: str = ",") -> dict[str, pa.DataType]:
    """The columns of a file and their types; a text file's are all text. Raises ContractViolation for a broken file."""
    if not file.is_parquet:
        return dict.fromkeys(column_names(_first_line(Path(file.path)), separator), pa.string())
    try:
        schema = pq.read_schema(file.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ContractViolation(f"{file.name}: not a complete Parquet file ({error}); copy it again.") from error
    return {field.name: _plain(field.type) for field in schema}


def is_same(one: SourceFile, other: SourceFile) -> bool:
    """Whether two files hold the same bytes."""
    return one.size == other.size and _sha256(Path(one.path)) == _sha256(Path(other.path))


def _plain(dtype: pa.DataType) -> pa.DataType:
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def manifest_entry(file: SourceFile) -> dict[str, Any]:
    return asdict(file)


def _sequence_file(root: Path) -> Path:
    paths = [root] if root.is_file() else sorted(root.glob("*.txt"))
    if len(paths) != 1:
        raise ConfigError(
            f"{root} holds {len(paths)} .txt files, and source.kind sequences needs one; name it in source.path."
        )
    return paths[0]


def _describe(
    role: str, path: Path, root: Path, remembered: Mapping[tuple[str, int, int], str] | None, titled: bool
) -> SourceFile:
    stat = path.stat()
    sha256 = ""
    if remembered is not None:
        sha256 = remembered.get((str(path), stat.st_size, stat.st_mtime_ns)) or _sha256(path)
    name = path.relative_to(root).as_posix()
    return SourceFile(role, name, str(path), stat.st_size, stat.st_mtime_ns, sha256, titled)


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
