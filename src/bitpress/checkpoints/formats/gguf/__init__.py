"""GGUF, the format of llama.cpp."""
def write(checkpoint, destination, *, overwrite): raise NotImplementedError
