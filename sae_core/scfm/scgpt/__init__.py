"""scGPT: its network, its tokenizer, and the reader of its folders (`files`)."""
