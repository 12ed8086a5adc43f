"""Searches: many trials over position embeddings, joins and hyper-parameters, and what they say.

Every decision is a pure function of the trials' records (`samplers`, `schedules`), which `ledger` keeps in the
storage; so a search that was killed goes on where it was. Trials train on Ray Train workers that stay warm (`lanes`,
`worker`), and `run` holds all together. `statistics`, `tables`, `pictures` and `page` say what came out.
"""
