"""Pictures and captions: where they come from, and how they reach the train step as moments, token ids and sizes.

    openmoji/                the OpenMoji drawings as a TFDS data set, without a download
    sources.py               a data set as a sequence of {"image", "caption", "crop"}; folders of pictures
    prompts.py               captions alone, from a .txt or .csv
    encoding.py, records.py  moments, token ids and sizes of a source, computed once and cached
    batching.py              pictures read ahead for the encoder, in batches of one size
    loader.py                shuffled batches of pictures or of a cache, with a position to save
    readers.py               large image sets as chunks of items (chunks.py): tars.py, tables.py (Parquet, Arrow),
                             folders.py (and zips), TFDS
    metadata.py, text.py     lists of pictures with captions, and text in any encoding
    pictures.py              picture files of any kind as 8-bit RGB of a given size
    buckets.py               the sizes for pictures of several aspect ratios
    filters.py               which items are kept, and in what form
    large.py                 the cache of a large set, built chunk by chunk on any number of hosts

Nothing here imports TensorFlow.
"""
