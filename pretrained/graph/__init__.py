"""The graph of a network: data flow, stages, layers and cuts, and recording of features."""
