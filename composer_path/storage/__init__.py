"""Where files lie: folders and buckets behind one interface."""
