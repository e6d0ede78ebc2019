"""Samples that say the same: exactly, once case, white space and Unicode forms are put aside, or nearly, up to some words.

    content      what a sample says, normalised
    minhash      shingles of words, MinHash signatures, and the bands that near duplicates share
    signatures   the signatures of a shard of a dataset as an artifact
    matching     which rows repeat which, from signatures; every near one is verified by its Jaccard similarity
    repeats      what was found, as an artifact

Nothing here needs a model (docs/decisions/0024-duplicates.md).
"""
