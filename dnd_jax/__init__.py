"""Drag-and-Drop LLMs in JAX: unlabeled prompts in, a ready LoRA adapter out."""
