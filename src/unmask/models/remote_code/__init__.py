"""Remote code: files that `unmask export` copies into a folder, where transformers runs them. Nothing here imports unmask."""
