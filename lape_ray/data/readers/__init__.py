"""Read batches of a split: one file for each `data.backend`.

buffers      memory for batches that is used again
native       a pass over a .beton through our own decoder, `native/` (C++); the default backend
resident     a pass over small images that lie on the device as a whole
torchvision  a pass over a source through Pillow and torchvision, the measure of the others
ffcv         FFCV's loader, made to fail loudly and to repeat itself; another backend
"""
