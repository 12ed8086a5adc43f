"""Log into MLflow.

client     the connection, and its errors in one line
runs       the driver's run: made, tagged, read and closed
tracker    rank 0's metrics and files on their way to it
artifacts  files and models
"""
