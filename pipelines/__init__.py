"""The stages: pin inputs, call `jobs` or `model`, commit outputs, log to MLflow; the command line; the whole run."""
