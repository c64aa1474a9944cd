"""Where sounds come from: decoding, downloads, the cache of features, and the kinds of datasets.
Nothing here knows a model."""
