"""LoRAs on quantized linears: files of every format, and adapters as more rank, which no kernel hears of."""
