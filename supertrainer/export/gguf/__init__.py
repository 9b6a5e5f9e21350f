"""GGUF files without a compiler: llama.cpp's format, written from a model folder and proven against it."""
