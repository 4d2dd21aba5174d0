"""Stored teacher features.

The words of this folder and of training/data/store.py:

    cache      a folder of teacher features for a list of shards: one sidecar per shard, and a manifest
    sidecar    the file beside one shard, with the features, crops and tokens of its samples
    record     the description of one finished sidecar and its shard, in the manifest and beside the sidecar
    view       one stored crop of a picture, with its features
    store      the reader that training asks for features: over a cache, or over DataCompDR's shards (`TeacherStore`)
    draw       what a store returns for one sample in one epoch: one view, two captions and their features
"""
