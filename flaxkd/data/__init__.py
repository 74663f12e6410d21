"""Pictures and captions: where they come from, and how they reach the train step as moments and token ids.

    openmoji/                the OpenMoji drawings as a data set of TFDS: the data that needs no download
    sources.py               a data set as a sequence of {"image", "caption"}; folders of pictures
    prompts.py               captions alone, of a .txt or .csv
    encoding.py, records.py  moments and token ids of a source, computed once and cached
    loader.py                shuffled batches of pictures or of a cache, with a position that can be saved
    readers.py, tables.py    large image sets: tars, Parquet, Arrow, folders and TFDS as chunks of items (chunks.py)
    filters.py               which items are kept, and as what
    large.py                 a cache of a large set, chunk by chunk, on any number of hosts

Nothing here imports TensorFlow.
"""
