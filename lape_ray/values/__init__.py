"""Values that come from outside, before anything relies on them. Standard library only.

typed        values that came from JSON, as the types that their reader needs
environment  variables for as long as a block lasts
plugin       a user's file of position embeddings: its text, its names, and whether it is trusted
program      what a person types to run a part of this package
redaction    secrets: names of variables, passwords in addresses
"""
