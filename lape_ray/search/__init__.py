"""Searches on Ray Tune: many trials over position embeddings, joins and hyper-parameters, and what they say.

options     the command line; `command`: from what a person types to a plan
plan        all that decides which trials there are and what becomes of them
space       axes over fields of a config, and cells; `cells`: the named spaces
strategies  which point comes next, and which trials go on: functions of the trials' records
record      a trial as the rest of this room sees it; `trials`: the view of Ray Tune's trial that it is, and the session
            of the driver that is at work on them
run         a search from its checks to its report
tuner       the Tuner, made or restored, and what it shows and watches; `scheduler`: Tune's scheduler and searcher
trial       a trial as an actor that leads its workers; `settings`: what the driver tells it
worker      what these workers do; `checkpoints`: where they keep it
runs        the search in MLflow; `live`: in a terminal or a log
statistics  what came out, as numbers and words; `report` and `pictures`: for people
"""
