"""Where a model comes from and how it is loaded: built-in, packaged, folder, GGUF file or Hub, one loader for all."""
