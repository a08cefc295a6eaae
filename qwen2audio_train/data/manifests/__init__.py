"""From any corpus to examples.

In: manifests (JSONL), tables, Kaldi folders, tars, hub data sets. Out: frozen `Example`s, or a ManifestError that names
file, line, field and what was expected.
"""
