"""Spark and Ray of one run: started at first use, one of each, stopped at the end."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from pipelines.ray_watch import RayWatch
from schemas.config import ResourceConfig
from schemas.outages import START_WORDS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Workers find the packages of this checkout, whatever their working directory.
ENVIRONMENT = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
STARTS = 3  # tries at most


class Engines:
    """Lazily started engines; `stop` ends those that this object started."""

    def __init__(self, resources: ResourceConfig) -> None:
        self.resources = resources
        self._spark: SparkSession | None = None
        self._ray_started = False
        self._watch: RayWatch | None = None

    @property
    def spark(self) -> SparkSession:
        if self._spark is None:
            from jobs.session import spark_session

            self._spark = spark_session(self.resources)
        return self._spark

    def ray(self) -> Any:
        """The `ray` module, connected: to `ray_address`, to the cluster of the Ray job that this is, or to a local Ray."""
        import ray

        if not ray.is_initialized():
            self._start_ray(ray)
        return ray

    def _start_ray(self, ray: Any) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        address = self.resources.ray_address or os.environ.get("RAY_ADDRESS")  # which `ray job submit` sets
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            self._start_servers(ray)
        for chatty in ("ray.data", "ray.train"):  # plans and timings of every small data set; errors are raised
            logging.getLogger(chatty).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True  # the same order on every pass
        context.enable_progress_bars = False
        self._ray_started = True

    def _start_servers(self, ray: Any) -> None:
        """A local Ray, tried again where a server was too slow: a raylet gives its agent 15 seconds, and then ends."""
        for trial in range(1, STARTS + 1):
            self._watch = RayWatch()
            self._watch.start()
            try:
                ray.init(
                    address="local",  # without it Ray joins a cluster that somebody started on this machine
                    num_cpus=self.resources.ray_cpus or os.cpu_count(),
                    object_store_memory=self.resources.object_store_mb * 2**20,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except BaseException as error:
                self._watch.stop()
                ray.shutdown()
                if trial == STARTS or not any(words in str(error) for words in START_WORDS):
                    raise
            else:
                return

    def stop_spark(self) -> None:
        """Ends the session and its JVM; the next use starts a new one."""
        if self._spark is not None:
            from jobs.session import end_session

            end_session(self._spark)
            self._spark = None

    def stop(self) -> None:
        self.stop_spark()
        if self._ray_started:
            import ray

            if self._watch is not None:
                self._watch.stop()
            ray.shutdown()
            self._ray_started = False
