"""Where files lie: folders and buckets behind one interface.

To add a kind of bucket: a `Store` in a file of its own, as s3.py is, and its scheme in `_STORES` of places.py.
"""
