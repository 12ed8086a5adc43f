"""Images from disk to the device: sources -> a .beton file -> batches -> augment -> mixup.

    sources/       class folders, parquet and tar shards and the bundled digits, as one kind of thing
    beton          writes a source as an FFCV file with a manifest beside it, and checks such a file
    order          which sample is trained on where: functions of the seed and the epoch alone
    loader         `build_loader`: batches of a .beton on the device, in an order known beforehand
    native_reader  a pass over a .beton through our own decoder, `native/` (C++); the default backend
    resident       a pass over small images that lie on the device as a whole
    torchvision_reader  a pass over a source through Pillow and torchvision, the measure of the others
    parallel       `map` over processes, in order
    ffcv_pipeline  FFCV's loader, made to fail loudly and to repeat itself; another backend
    augment        what follows the crop, batched on the device: RandAugment, 3-Augment, jitter, erasing
    mixup          `Mixer`: mixup and CutMix of a batch, on its device

Nothing is imported here: sources and beton need no torch, mixup needs no ffcv, and ffcv (seconds to import)
is loaded by `build_loader` when it is called.
"""
