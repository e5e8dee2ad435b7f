"""Reading and writing files that nobody vouches for: strict JSON, safetensors headers, paths."""
