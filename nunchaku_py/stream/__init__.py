"""Models larger than memory: built empty, computed and quantized block by block from files, written as they come."""
