"""Run a training on Ray: connect, launch, supervise, report. Only this room and search import ray.

launch           `fit`: a run as its driver sees it
controller       Ray Train's controller of a run: built, supervised, started again
worker           a worker process: the checkpoint to resume from, and what it reports
supervisor       the actor that carries stop requests and counts failures
connection       a connection to Ray, and work spread over its nodes
local            a Ray of this machine, for the demo and the tests
demo             the steps behind jobs/demo.py
prometheus       the gauges of a run
run_record       `run.json`: a run's config, its MLflow run, and whether it is finished
checkpoint_list  the checkpoints of a run that count, and what may be deleted
"""
