"""From any corpus to packed batches.

In: manifests, tables, tars, hub data sets. Out: a loader whose batches have the fields of the packed batch in `layout`.
The rooms stand on floors, each importing only what stands below it (top to bottom):

    tools       what launch/data.py runs
    loading     loaders: indexed and streaming
    samples     Example -> Sample -> packed batch, in the workers
    audio       Clip -> waveform -> mel
    order       which example stands where; metadata only
    manifests   any corpus -> manifest line -> Example
    prompts     Example -> pieces -> token ids
    examples, quarantine
    storage     bytes, wherever they lie
"""
