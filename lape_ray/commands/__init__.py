"""The command `lape-ray`: a file for each of its subcommands, which parses, calls and prints. jobs/ runs the same.

main        which subcommands there are; the entry point of the console
train       one recipe
tune        a search over position embeddings, joins and hyper-parameters
write_data  images to a .beton
evaluate    exact accuracy of a checkpoint
predict     classes of a folder of images
export      a checkpoint in other tools' formats
report      what each layer's position embedding looks like
demo        the whole service on this machine
doctor      what of a run's needs works on this machine
checks      what the doctor asks, a function for each line
completion  scripts by which a shell completes subcommands, recipes and fields

A subcommand has `build_parser` and `main`. Nothing but the standard library is imported before a command line is
parsed, so that --help is instant.
"""
