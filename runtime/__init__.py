"""What a run needs and the paper does not speak of: sampling, loading, GPUs, memory, files."""
