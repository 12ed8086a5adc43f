"""What several tests share. They import it as `helpers.NAME`; nothing here is collected as a test.

browser              headless Chromium
commands             jobs and benchmarks as commands, within the process
device               steps that take time and no CPU
faults               faults at a chosen moment, and the table of what they cost
layouts              small data sets in folders, parquet files and tars, as people have them
interpreted_augment  the fused kernels in Triton's interpreter; a process for data/test_fused_augment.py
manifests            k8s/ as kustomize renders it, and the rules that no schema holds
networks             small networks of every family, and the official code's outputs
nodes                a run on a cluster of several nodes; a process for cluster/test_nodes.py
photographs          image folders and parquet files, cut out of three photographs
s3_server            JuiceFS's S3 gateway, a slow proxy and a server that refuses
service              the whole service: a cluster, a home, tiny data
storm                kills by a Poisson process, and what of a cluster grows meanwhile
threads              arithmetic in one thread
tracking_server      an MLflow server that can be stopped and started
"""
