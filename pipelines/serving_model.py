"""The file that MLflow loads: the model as code, nothing pickled."""

from mlflow.models import set_model

from pipelines.serving import LazyRecModel

set_model(LazyRecModel())
