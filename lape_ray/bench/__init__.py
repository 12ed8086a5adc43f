"""What this package's speed is, measured beside its peers: what `jobs/benchmark.py` prints.

    loader      the subcommand of that name; settings, what it measures; loader_report, its tables
    inputs      which images: a source's or drawn ones, as originals, at 500 pixels, with restart markers, as .beton
    gate        nothing is timed before our pixels are Pillow's
    decoder     crops out of JPEGs in memory
    contenders  whole loaders: ours, FFCV's, torchvision's
    isolated    each contender in a process of its own, in interleaved rounds
    fresh       what only a fresh process shows: memory and start-up
    feeding     the device's side: augmentation, and training steps fed by the loader
    step        the subcommand of that name; compare, orchestration (`ray`) and saving (`checkpoint`), the others
    commands    their command lines' values; step_report, their tables; goals, their targets; suite, the GPU's in one go
    synthetic   the loop's own step on images that are there already
    peers       our networks and others, with the same weights; maths, that all compute the same
    clock       windows of steps, interleaved; counts, operators, kernels and memory; ceilings, operations and peaks
    rank        one process of `ray`, whoever started it; driver, the process that starts them with Ray Train
    targets     what `loader` must reach, and whether a record says that it was
    record      measured values with their spread, machine, versions; the JSON file
    table       aligned tables for the terminal

Nothing is imported here. Peers are imported where they run, and one that is missing is a row that says so.
"""
