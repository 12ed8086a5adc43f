"""Images from disk to the device: sources -> a .beton file -> batches -> augmented, normalised -> mixup.

    sources/   class folders, parquet and tar shards and the bundled digits, as one kind of thing
    beton/     writes a source as an FFCV file with a manifest, and checks such a file
    installed  whether what a backend needs is there
    options    the command line of jobs/write_beton.py
    sampler    the orders of samples: functions of the seed and the epoch alone
    loader     `build_loader`: batches of a .beton on the device, in an order known beforehand
    batch      `Batch`: images, labels and epoch indices; what training and evaluation read
    ready      `Augmented`, `Normalized`: a loader whose batches are ready for the network
    processes  `map` over processes, in order
    augment/   what follows the crop, batched on the device: RandAugment, 3-Augment, jitter, erasing
    mixup      `Mixer`: mixup and CutMix of a batch, on its device
    readers/   a pass over a split, by backend: native, resident, ffcv, torchvision
    native/    our decoder, in C++
    split      `SplitInfo`: what is known of a split before an image is read
    center     the square that evaluation sees, by Pillow
    remote     .beton files on S3, and their copies on this machine
    streaming/  training while such a copy is still on its way
    normalize  pixels as the network reads them

Nothing is imported here: sources and beton need no torch, mixup needs no ffcv, and ffcv (seconds to import)
is loaded by `READERS` when a file is opened with it.
"""
