"""Run a training on Ray: connect, launch, supervise, report. Only this room and search import ray.

launch           `fit`: a run as its driver sees it
controller       Ray Train's controller of a run: built, supervised, started again
run              `Run`: what the driver decided about a run, as it travels to the workers
run_end          the ways in which workers end a run for good
worker           a worker process: may it start, where does it continue, how does it end
reporter         what the loop reports, carried to Ray Train, the tracker, Prometheus and the log
checkpoint_writer  checkpoints on their way from rank 0's memory to storage
supervisor       the actor that carries stop requests and counts failures
connection       a connection to Ray, and work spread over its nodes
resources        what a training takes of the cluster, and whether there is room
local            a Ray of this machine, for the demo and the tests
demo             the steps behind jobs/demo.py
prometheus       the gauges of a run
run_record       `run.json`: a run's config, its MLflow run, and whether it is finished
checkpoint_list  the checkpoints of a run that count, and what may be deleted
"""
