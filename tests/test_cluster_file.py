"""`ray up` accepts the cluster file: it is checked against Ray's own schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from tests.conftest import REPOSITORY

SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def test_the_cluster_file_fits_rays_schema() -> None:
    cluster = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    jsonschema.validate(cluster, SCHEMA)
    assert cluster["provider"]["type"] == "local"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_workers": "two"}, SCHEMA)
