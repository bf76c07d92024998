"""From sources to packed rows: tokenizer, chat templates, readers, mixture, packing; knows no model and no training."""
