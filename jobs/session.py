"""The Spark session, and the JARs that Delta needs.

`python -m jobs.session` resolves the JARs once, at set-up, into the environment, so that sessions start offline and
two seconds sooner than with `spark.jars.packages`; it also tells the environment's own `spark-submit` of them. On a
cluster whose image carries the JARs nothing is resolved.

Under spark-submit the JVM is there before this module: master, memory and JARs are then spark-submit's alone.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from py4j.protocol import Py4JError
from pyspark import SparkContext
from pyspark.sql import SparkSession

from schemas.config import ResourceConfig
from schemas.errors import LazyRecError

QUIET = f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
JAVA_VERSIONS = (17, 21, 25)
DELTA = version("delta-spark")
UNITY_CATALOG = "0.6.0"  # the client that Delta 4.4 links against
COORDINATES = (
    f"io.delta:delta-spark_4.2_2.13:{DELTA}",
    f"io.delta:delta-storage:{DELTA}",
    f"io.delta:delta-kernel-api:{DELTA}",
    f"io.delta:delta-kernel-defaults:{DELTA}",
    f"io.delta:delta-kernel-unitycatalog:{DELTA}",
    f"io.unitycatalog:unitycatalog-client:{UNITY_CATALOG}",
    f"io.unitycatalog:unitycatalog-hadoop:{UNITY_CATALOG}",
)
# What Ivy would fetch beside them lies in Spark's own folder, in newer versions.
EXCLUDES = (
    "org.roaringbitmap:*,com.fasterxml.jackson.*:*,org.apache.*:*,org.slf4j:*,org.openapitools:*,jakarta.*:*,com.google.*:*"
)


def jar_folder() -> Path:
    return Path(sys.prefix) / "share" / "lazyrec-jars"


def jar_files() -> list[Path]:
    """The resolved JARs, complete for this Delta version, or an empty list."""
    files = [jar_folder() / (":".join(c.split(":")[1:]).replace(":", "-") + ".jar") for c in COORDINATES]
    return files if all(file.is_file() for file in files) else []


def write_submit_defaults() -> Path:
    """`spark-submit` of this environment finds the JARs; it runs the Python of the path, so activate the environment."""
    import pyspark

    path = Path(pyspark.__file__).parent / "conf" / "spark-defaults.conf"
    path.parent.mkdir(exist_ok=True)
    jars = ",".join(map(str, jar_files()))
    path.write_text(f"spark.jars {jars}\nspark.driver.extraJavaOptions {QUIET}\n")
    return path


def by_spark_submit() -> bool:
    return "PYSPARK_GATEWAY_PORT" in os.environ


def java_version() -> int:
    """Major version of the Java that Spark will start. Raises LazyRecError where there is none that fits."""
    home = os.environ.get("JAVA_HOME")
    command = f"{home}/bin/java" if home else "java"
    remedy = "Install a JDK (Debian: apt-get install openjdk-17-jre-headless) or set JAVA_HOME."
    if shutil.which(command) is None:
        raise LazyRecError(f"Spark needs Java {', '.join(map(str, JAVA_VERSIONS))}, and {command} is not there. {remedy}")
    ran = subprocess.run([command, "-version"], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise LazyRecError(f"{command} does not run (exit code {ran.returncode}). {remedy}")
    banner = ran.stderr
    match = re.search(r'version "(\d+)', banner)
    major = int(match.group(1)) if match else 0
    if major < JAVA_VERSIONS[0]:
        raise LazyRecError(f"Spark needs Java {JAVA_VERSIONS[0]} or later, and {command} is Java {major}. {remedy}")
    return major


def spark_session(resources: ResourceConfig, name: str = "lazyrec") -> SparkSession:
    """The one session of a run, started at the first call. Times are UTC; tables are plain Delta."""
    builder = (
        SparkSession.builder.appName(name)
        .config("spark.sql.shuffle.partitions", str(resources.spark_partitions))
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.databricks.delta.snapshotPartitions", "2")  # 50 by default: seconds an operation on 2 cores
        # Delta leaves out a commit that changes no file; the stamp of a day without rows would be lost with it.
        .config("spark.databricks.delta.skipRecordingEmptyCommits", "false")
        .config("spark.sql.legacy.parquet.nanosAsLong", "true")  # pandas' timestamps are refused otherwise
        .config("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
        .config("spark.sql.parquet.compression.codec", "zstd")
        .config("spark.hadoop.fs.s3.impl", "org.apache.hadoop.fs.s3a.S3AFileSystem")  # delta-rs and Ray say s3:// too
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
    )
    logging.getLogger().addFilter(_is_not_py4j)
    if by_spark_submit():
        return _without_traces(builder.getOrCreate())
    java_version()
    # Workers would otherwise start the system's python3, which lacks pyarrow.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    further = dict(entry.split("=", 1) for entry in resources.spark_conf)
    for key, value in (own_jvm(resources) | further).items():
        builder = builder.config(key, value)
    return _without_traces(builder.getOrCreate())


def _without_traces(spark: SparkSession) -> SparkSession:
    """A JVM that dies breaks off its connection to PySpark's server of accumulators, which prints a traceback for it; what
    waits for the JVM raises as well."""
    server = spark.sparkContext._accumulatorServer
    vars(server)["handle_error"] = lambda request, address: None
    return spark


def _is_not_py4j(record: logging.LogRecord) -> bool:
    """Py4J logs, by the root logger, the traceback of an error of a dead JVM that it raises as well."""
    return record.module not in ("java_gateway", "clientserver")


def own_jvm(resources: ResourceConfig) -> dict[str, str]:
    """What must be known before the JVM starts."""
    settings = {
        "spark.driver.memory": resources.spark_heap,
        "spark.driver.extraJavaOptions": QUIET,
    }
    if resources.spark_master:
        settings["spark.master"] = resources.spark_master
    if resources.spark_master.startswith("local"):
        settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    files = jar_files()
    if files:
        return settings | {"spark.jars": ",".join(map(str, files))}
    return settings | {"spark.jars.packages": ",".join(COORDINATES), "spark.jars.excludes": EXCLUDES}


def end_session(spark: SparkSession) -> None:
    """Stops the session and ends its JVM, which would otherwise keep its heap until this process ends. A JVM that has
    ended already is no error here: whoever used it has one."""
    with suppress(Py4JError, OSError):
        spark.stop()
    gateway = SparkContext._gateway
    if gateway is None:  # Spark Connect, or spark-submit owns the JVM
        return
    process = getattr(gateway, "proc", None)
    with suppress(Py4JError, OSError):
        gateway.shutdown()
    SparkContext._gateway = SparkContext._jvm = None
    if process is not None:
        with suppress(OSError):
            process.stdin.close()  # the JVM ends when its parent's end of the pipe does
        process.wait()


def resolve_jars() -> list[Path]:
    """Fetches the JARs by coordinate into the environment, once. Raises LazyRecError where that fails."""
    if not jar_files():
        java_version()
        cache = jar_folder() / "ivy"
        session = (
            SparkSession.builder.master("local[1]")
            .config("spark.jars.packages", ",".join(COORDINATES))
            .config("spark.jars.excludes", EXCLUDES)
            .config("spark.jars.ivy", str(cache))
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .getOrCreate()
        )
        session.stop()
        for file in (cache / "jars").glob("*.jar"):
            shutil.copy(file, jar_folder() / file.name.split("_", 1)[1])  # Ivy prefixes the group
        shutil.rmtree(cache)
        if not jar_files():
            raise LazyRecError(f"Maven delivered other JARs than expected into {jar_folder()}: remove it and try again.")
    return jar_files()


if __name__ == "__main__":
    sys.stdout.write("\n".join(file.name for file in resolve_jars()) + f"\n{write_submit_defaults()}\n")
