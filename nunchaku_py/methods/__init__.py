"""Quantization methods: one published idea per file, each a step `name(work, ctx)` that changes one thing of a Work."""
