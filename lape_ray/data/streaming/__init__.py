"""Training on data that are still on their way from S3, block by block, in the order in which they are needed.

    blocks     `Layout`: the numbers of all blocks of a set, and the map of those that are here
    arrivals   `Arrivals`: what a reader asks before it touches bytes, and where it says which it needs next
    wants      what the readers of a machine need next, as the fetcher sees it
    download   `Download`: one set's blocks, from this disk, another node or S3, each verified
    peers      verified blocks for other nodes of a run
    fetcher    the process that fetches, one for each node of a run
    start      starts it, and waits until training may begin

Each block is verified by a sha256 that the manifest vouches for (`beton.blocks`) before it is marked in the map. The
folder of a set that arrives, `.arriving` in the place of its copy (`storage.copies`), holds
- `NAME.beton` and `NAME.beton.json` as they will be, but with holes;
- `have`, the map: a byte for the state of the whole, then one for each block;
- `wants-*`, what one reader needs: its place in its order, then the order itself;
- `error`, why nothing more will come, while the process that failed still lives;
- `.lock`, held by the process that fetches.
"""
