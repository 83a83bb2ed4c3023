"""Split models: a ViT or a GPT-2 in three components (bottom, trunk, top), each in files of its own."""
