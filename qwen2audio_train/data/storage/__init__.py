"""Bytes, wherever they lie: local files, members of tars, URLs, object stores.

In: a path or URL. Out: bytes or a range of them, or a BlobError. Knows nothing of audio or manifests.
"""
