"""Images from disk to the device: sources -> a .beton file -> batches -> mixup.

    sources        folders of class folders, parquet shards and the bundled digits, as one kind of thing
    beton          writes a source as an FFCV file with a manifest beside it, and checks such a file
    loader         `build_loader`: batches of a .beton on the device, in an order known beforehand
    ffcv_pipeline  FFCV's loader, made to fail loudly and to repeat itself; the only module that imports ffcv
    mixup          `Mixer`: mixup and CutMix of a batch, on its device

Nothing is imported here: sources and beton need no torch, mixup needs no ffcv, and ffcv (seconds to import)
is loaded by `build_loader` when it is called.
"""
