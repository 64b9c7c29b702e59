"""`ingraft eval`: loss and metrics of a base, or of a base with an adapter, on a data set, computed as training computes them."""
