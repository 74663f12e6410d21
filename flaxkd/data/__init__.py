"""Pictures and captions: where they come from, and how they reach the train step as moments and token ids.

    openmoji.py (+ openmoji_names.py)   TFDS builder of the OpenMoji drawings, the data that needs no download
    sources.py                          a data set as a sequence of {"image", "caption"}; image folders
    prompts.py                          captions alone, of a .txt or .csv
    cache.py                            VAE moments and token ids of a source, computed once
    inputs.py, tables.py                tars, Parquet, Arrow, folders and TFDS as parts of items (parts.py)
    selection.py                        which items are kept, and as what
    build.py                            a cache of a large set, part by part, on any number of hosts
    loader.py                           shuffled batches of a cache, with a position that can be saved

Nothing here imports TensorFlow or a model: the encoder and the tokenizer are given as functions.
"""
