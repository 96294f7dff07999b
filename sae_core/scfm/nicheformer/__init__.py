"""Nicheformer: its network, its tokenizer with the context of a cell, and the reader of its folders (`files`)."""
