"""Operations with derivatives of their own: Triton on a GPU, PyTorch elsewhere, each beside a plain reference."""
