"""What becomes of an error from outside this program: a full disk, a dead JVM, a lost worker, a cluster that is not there.

Each is one sentence that says what is wrong and what to do. An error that none of these explains is a defect of this
program and keeps its traceback.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from schemas.config import Config
from schemas.errors import LazyRecError
from schemas.lake import lake_of

AGAIN = "the tables are at their last committed version, and the same command goes on from there."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As the system, SQLite, the JVM, delta-rs and safetensors say it.
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "database or disk is full")
DENIED_WORDS = ("Permission denied", "Read-only file system")
LONGEST = 300  # characters of another's message
JVM_ERRORS = ("Py4JNetworkError", "Py4JConnectionError")
JVM_WORDS = ("Answer from Java side is empty", "while trying to connect to the Java server", "JAVA_GATEWAY_EXITED")
WORKER_ERRORS = ("WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "ActorUnavailableError", "RaySystemError")
WORKER_WORDS = ("worker process has died", "Worker unexpectedly exits", "Worker exits unexpectedly", "node has died")
START_WORDS = ("Timed out waiting for file", "node timed out during startup")  # a server of Ray was too slow, or ended
CLUSTER_WORDS = ("Could not find any running Ray instance", "Failed to connect to GCS", "Ray Client connection timed out")


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Raises what ends the block as an error for people, where it is one; else as it came."""
    try:
        yield
    except Exception as error:
        if sentence_of(error) is not None:
            raise
        found = outage_of(error, config)
        if found is None:
            raise
        raise found from error


def sentence_of(error: BaseException | None) -> LazyRecError | None:
    """The error for people behind `error`: itself, or the cause that a worker of Ray or Spark reported."""
    return next((cause for cause in _chain(error, contexts=False) if isinstance(cause, LazyRecError)), None)


def outage_of(error: BaseException, config: Config) -> LazyRecError | None:
    """The sentence for an error of the system or of an engine, or None."""
    chain = list(_chain(error))
    text = "\n".join(f"{type(e).__name__}: {e}" for e in chain)
    if any(isinstance(e, OSError) and e.errno in FULL for e in chain) or _says(text, FULL_WORDS):
        places = f"the lake {lake_of(config).home} or temporary files in {tempfile.gettempdir()}"
        return LazyRecError(f"No space is left for {places}; free some: {AGAIN}")
    denied = next((line for line in text.splitlines() if _says(line, DENIED_WORDS)), None)
    if denied:
        return LazyRecError(f"{denied[:LONGEST]}; let this user write the lake and read its source: {AGAIN}")
    if any(map(_is_dead_jvm, chain)) or _says(text, JVM_WORDS):
        heap = config.resources.spark_heap
        return LazyRecError(
            f"Spark's JVM ended in the middle of the work, killed or out of memory (resources.spark_heap: {heap}); {AGAIN}"
        )
    if _says(text, CLUSTER_WORDS):
        address = config.resources.ray_address or "RAY_ADDRESS"
        return LazyRecError(f"No Ray cluster answers at resources.ray_address ({address}); start it or correct it.")
    if _says(text, START_WORDS):
        return LazyRecError(f"Ray's servers did not start: the machine is busy, or short of memory; {AGAIN}")
    if any(type(e).__name__ in WORKER_ERRORS for e in chain) or _says(text, WORKER_WORDS):
        return LazyRecError(f"A process of Ray ended in the middle of the work, killed or out of memory; {AGAIN}")
    return None


def _is_dead_jvm(error: BaseException) -> bool:
    """Py4J's own errors have no word of Java; one that a living JVM answered is a subclass, or brings a trace."""
    name = type(error).__name__
    return name in JVM_ERRORS or (name == "Py4JError" and "Trace:" not in str(error))


def _says(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _chain(error: BaseException | None, contexts: bool = True) -> Iterator[BaseException]:
    """The error and what lies behind it, the last cause last; `contexts`: errors too during whose handling one came."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "cause", None) or error.__cause__ or (error.__context__ if contexts else None)
