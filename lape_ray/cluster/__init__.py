"""Run a training, on Ray or in this process: launch, supervise, report. Only this room and search import ray.

launch           `fit`: a run as its driver sees it
in_process       a run in the process of its command, without Ray
on_ray           a run on Ray: connected, with room for its workers
controller       Ray Train's controller of a run: built, supervised, started again
run              `Run`: what the driver decided about a run, as it travels to the workers
run_end          the ways in which workers end a run for good
worker           a worker: may it start, where does it continue, how does it end
ray_worker       a worker of Ray Train, which trains in one group of workers after another
group            the workers as one of them sees the others
signals          SIGTERM, Ctrl-C and a closed terminal as requests to end after a checkpoint
pages            a trained run's pages in MLflow
reporter         what the loop reports, carried to storage, the tracker, Prometheus and the log
compile_cache    compiled code of a run, stored with it for machines that have none
checkpoint_writer  checkpoints on their way from rank 0's memory to storage
rendezvous       the supervisor of a run, by which its workers meet
supervisor       the actor that carries stop requests and counts failures
failure_count    what Ray Train's controller tells it of failures
connection       a connection to Ray, and work spread over its nodes
resources        what a training takes of the cluster, and whether there is room
interface        the network interface by which workers of several nodes meet
local            a Ray of this machine, for the demo and the tests
demo             the steps behind `lape-ray demo`
prometheus       the gauges of a run
journal          what the time of a run goes into, as its processes write it down
run_record       `run.json`: a run's config, its MLflow run, and whether it is finished
checkpoint_list  the checkpoints of a run that count, and what may be deleted
"""
