"""scFoundation: its network, its tokenizer, the decoder of its pretraining, and the reader of its folders (`files`)."""
