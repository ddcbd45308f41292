"""LoRA: every community format read to one form, and what is done with it."""
