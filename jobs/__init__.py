"""Spark: DataFrame in, DataFrame out, one job a file. `jobs.tables` alone reads and writes Delta from Spark."""
