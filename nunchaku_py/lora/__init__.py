"""LoRAs on quantized linears: more rank, and nothing that a kernel hears of."""
