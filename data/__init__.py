"""Token shards: the file format, reading batches from them, and making them."""
