"""Where sounds come from: decoding, downloads, the cache of features, and a file for each kind of dataset.
Nothing here knows a model."""
