"""From datasets to pair store: the PyTorch side of the pipeline."""
